"""The sequences of one request: submits them, yields their text as deltas, and releases them when the request ends."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from starlette.requests import Request

from server.api.context import AdapterUse, AppContext
from server.api.errors import ApiError, engine_unavailable, server_error, unavailable
from server.api.inference import admission
from server.api.inference.admission import Target
from server.api.middleware.auth import Key
from server.api.middleware.rate_limits import Lease
from server.api.middleware.request_scope import unless_disconnected
from server.api.schemas import GenerationRequest, PromptTokensDetails, UsageBody
from server.api.text.tokenizer import Detokenizer, Tokenizer
from server.ipc.client import EngineState, Stream
from server.ipc.messages import SequenceOutput, Submit
from server.metrics import RequestTimer
from server.sequence import SamplingParams, TokenLogprobs


@dataclass(slots=True)
class TokenScore:
    """A generated token with its log-probabilities and the offset of its text in the choice's text."""

    token_id: int
    logprobs: TokenLogprobs
    offset: int


@dataclass(slots=True)
class Delta:
    """New output of one choice since the previous delta: usually one token, more if the reader lags."""

    index: int
    text: str = ""
    num_tokens: int = 0
    scores: list[TokenScore] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def extend(self, delta: "Delta") -> None:
        self.text += delta.text
        self.num_tokens += delta.num_tokens
        self.scores += delta.scores
        self.finish_reason = delta.finish_reason


class Choice:
    """One sequence and the state of its text."""

    def __init__(self, index: int, detokenizer: Detokenizer, stop_ids: frozenset[int]):
        self.index = index
        self.finished = False
        self.num_tokens = 0
        self.cached_tokens = 0
        self.queue_seconds = 0.0
        self._detokenizer = detokenizer
        self._stop_ids = stop_ids

    def absorb(self, output: SequenceOutput, delta: Delta) -> None:
        """Add `output` to `delta`. Raises `EngineFailure` if the sequence was aborted or failed."""
        reason = output.finish_reason
        if reason == "error" or reason == "abort" or reason == "timeout":
            self.finished = True
            raise EngineFailure(reason, output.error)
        self.cached_tokens, self.queue_seconds = output.num_cached_tokens, output.queue_seconds
        text_ends = output.finish_reason == "stop" and output.token_ids and output.token_ids[-1] in self._stop_ids
        for i, token_id in enumerate(output.token_ids):
            delta.num_tokens += 1
            self.num_tokens += 1
            if text_ends and i == len(output.token_ids) - 1:
                break  # the token that ended the sequence is counted but is not part of the text
            if output.logprobs is not None:
                delta.scores.append(TokenScore(token_id, output.logprobs[i], self._detokenizer.decoded_chars))
            delta.text += self._detokenizer.feed(token_id)
            if self._detokenizer.stopped:
                self._finish(delta, "stop")
                return
        if reason is not None:
            delta.text += self._detokenizer.flush()
            self._finish(delta, reason)

    def _finish(self, delta: Delta, reason: Literal["stop", "length"]) -> None:
        self.finished = True
        delta.finish_reason = reason


class EngineFailure(Exception):
    """The engine aborted a sequence or failed to compute it."""

    def __init__(self, reason: str, message: str | None):
        super().__init__(message or reason)
        self.reason = reason
        self.message = message


class Generation:
    """The sequences of one request. `close` must be called when the request ends, for whatever reason."""

    def __init__(
        self, context: AppContext, target: Target, tokenizer: Tokenizer, lease: Lease, prefix: str, started: float
    ):
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.target = target
        self.prompt_tokens = 0
        self.timer = RequestTimer(context.metrics, target.label, started)
        self._context = context
        self._tokenizer = tokenizer
        self._lease = lease
        self._choices: list[Choice] = []
        self._n = 1
        self._stream = Stream()
        self._open: dict[str, Choice] = {}  # by sequence
        self._uses: list[AdapterUse] = []

    def submit(
        self,
        key: Key,
        prompts: Sequence[list[int]],
        n: int,
        sampling: SamplingParams,
        stop: Sequence[str],
        priority: int = 0,
    ) -> None:
        """Submit `n` sequences per prompt. If it raises `EngineUnavailable`, none is left running."""
        stop_ids = frozenset((*self._context.info.eos_token_ids, *sampling.stop_token_ids))
        self._n = n
        self._uses = [self._context.in_flight.use(name) for name in self.target.names]
        for use in self._uses:
            use.requests += 1
            use.last_used = self.created
        try:
            for prompt in prompts:
                self.prompt_tokens += len(prompt)
                adapters, active_from = self.target.on(prompt)
                for i in range(n):
                    seq_id = f"{self.id}-{len(self._choices)}"
                    seeded = _with_seed(sampling, i)
                    text = Detokenizer(self._tokenizer, prompt, stop, sampling.min_tokens)
                    choice = Choice(len(self._choices), text, stop_ids)
                    sequence = Submit(seq_id, prompt, seeded, adapters, key.tenant, active_from, priority, key.weight)
                    self._start(choice, sequence)
        except BaseException:
            self.close()
            raise
        for use in self._uses:
            use.prompt_tokens += self.prompt_tokens
        self.timer.submitted(self.prompt_tokens)

    def _start(self, choice: Choice, submit: Submit) -> None:
        self._context.engine.submit(submit, self._stream)
        digests = frozenset(adapter.digest for adapter in self.target.adapters)
        self._context.in_flight.start(submit.seq_id, self.target.names, digests)
        self._choices.append(choice)
        self._open[submit.seq_id] = choice

    def __len__(self) -> int:
        return len(self._choices)

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Yield the new output of the choices until all have finished. Raises `ApiError` if one fails."""
        try:
            while self._open:
                yield self._absorb(await self._stream.take())
        except EngineFailure as failure:
            raise self._api_error(failure) from failure

    def _absorb(self, outputs: list[SequenceOutput]) -> list[Delta]:
        deltas: dict[str, Delta] = {}
        for output in outputs:
            choice = self._open.get(output.seq_id)
            if choice is None:  # ended by a stop string, which the engine does not know
                continue
            delta = deltas.get(output.seq_id)
            if delta is None:
                delta = deltas[output.seq_id] = Delta(choice.index)
            choice.absorb(output, delta)
            if choice.finished:
                self._end([output.seq_id], abort=output.finish_reason is None)
        return self._account(list(deltas.values()))

    def _account(self, deltas: list[Delta]) -> list[Delta]:
        total = sum(delta.num_tokens for delta in deltas)
        for use in self._uses:
            use.generated_tokens += total
            use.rate.add(total)
        self._lease.generated(total)
        for delta in deltas:
            self.timer.tokens(delta.index, delta.num_tokens, self._choices[delta.index].queue_seconds)
        return deltas

    def _end(self, seq_ids: list[str], *, abort: bool) -> None:
        if abort:
            self._context.engine.abort(seq_ids)
        for seq_id in seq_ids:
            del self._open[seq_id]
            self._context.in_flight.finish(seq_id)

    def _api_error(self, failure: EngineFailure) -> ApiError:
        if failure.reason == "abort":
            return unavailable(
                "The request was aborted because its adapter was deleted or the server is shutting down.", "aborted"
            )
        if self._context.engine.state is not EngineState.READY:
            return engine_unavailable(self._context.engine.state)
        try:
            admission.check_room(self._context, self.target.pages)  # other adapters may have been pinned meanwhile
        except ApiError as no_room:
            return no_room
        return ApiError(500, failure.message, code="engine_error") if failure.message else server_error()

    def close(self) -> None:
        """Abort running sequences and release everything. May be called twice."""
        self._end(list(self._open), abort=bool(self._open))
        self._lease.close()
        self.timer.ended()

    def usage(self) -> UsageBody:
        completion = sum(choice.num_tokens for choice in self._choices)
        cached = sum(choice.cached_tokens for choice in self._choices[:: self._n])  # a prompt counts once
        return UsageBody(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion,
            total_tokens=self.prompt_tokens + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


def _with_seed(sampling: SamplingParams, i: int) -> SamplingParams:
    """Give the i-th of n choices its own seed, so that the choices differ."""
    if i == 0 or sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + i) % (1 << 63))


def start_generation(
    request: Request,
    context: AppContext,
    key: Key,
    body: GenerationRequest,
    target: Target,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    prefix: str,
    requested: int | None,
    default: int | None,
    logprobs: int | None,
) -> Generation:
    """Validate and submit `prompts`, encoded by `tokenizer`. Raises 429 if a key or an adapter is at its limits."""
    admission.check_still_there(context, target)
    vocab_size = admission.vocab_size_of(context, target)
    admission.check_prompts(prompts, vocab_size)
    max_tokens = admission.token_budget(context, prompts, requested, default)
    sampling = admission.sampling_params(vocab_size, body, max_tokens, logprobs, tokenizer.end_ids)
    priority = admission.priority_of(context, body)
    n = body.n or 1
    admission.check_queue(context, key, len(prompts) * n, sum(map(len, prompts)) * n)
    lease = context.rate_limits.begin_request(key.sha256, key.limits, target.adapter_names, sum(map(len, prompts)))
    generation = Generation(context, target, tokenizer, lease, prefix, request.state.started)
    generation.submit(key, prompts, n, sampling, body.stop_strings, priority)
    return generation


async def collect(request: Request, generation: Generation) -> list[Delta]:
    """Return the whole output, one delta per choice. Stops the sequences if the client disconnects."""
    try:
        return await unless_disconnected(request.receive, _collect(generation))
    finally:
        generation.close()


async def _collect(generation: Generation) -> list[Delta]:
    whole = [Delta(index) for index in range(len(generation))]
    async with aclosing(generation.deltas()) as batches:
        async for deltas in batches:
            for delta in deltas:
                whole[delta.index].extend(delta)
    return whole
