"""The outputs of one request's sequences on their way to the reader."""

import asyncio

from server.ipc.messages import SequenceOutput


class Stream:
    """The outputs of the sequences of one request, in order; the last output of each has a `finish_reason`.

    Uses a plain list and one future, so that each message of the engine wakes the reader once.
    """

    __slots__ = ("_outputs", "_waiter")

    def __init__(self) -> None:
        self._outputs: list[SequenceOutput] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: SequenceOutput) -> None:
        """Append an output and wake the reader."""
        self._outputs.append(output)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[SequenceOutput]:
        """Wait for outputs and return all of them. Only one reader at a time."""
        if not self._outputs:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs
