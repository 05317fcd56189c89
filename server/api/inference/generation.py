"""The sequences of one request: submits them, yields their text as deltas, and releases them when the request ends."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import msgspec
from starlette.requests import Request

from server.api.context import AdapterUse, AppContext, Running
from server.api.errors import ApiError, bad_request, engine_unavailable, server_error, unavailable
from server.api.inference.choices import Choice, Delta, EchoedPrompt, EngineFailure
from server.api.inference.plan import GenerationPlan
from server.api.inference.targets import adapter_failed, merged_error, room_error
from server.api.middleware.rate_limits import Lease
from server.api.middleware.request_scope import unless_disconnected
from server.api.requests.wire import MAX_CHOICES
from server.api.schemas import PromptTokensDetails, UsageBody
from server.api.text.detokenizer import Detokenizer
from server.ipc.messages import SequenceOutput, Submit
from server.ipc.stream import Stream
from server.ipc.supervisor import EngineState
from server.metrics import RequestTimer
from server.request import SamplingParams
from server.version_labels import version_label

MAX_OPEN = MAX_CHOICES  # sequences of a request at once; more inputs, of embeddings, follow as others end


class Generation:
    """The sequences of one request. `close` must be called when the request ends, for whatever reason."""

    def __init__(self, context: AppContext, plan: GenerationPlan, lease: Lease):
        self.plan = plan
        self.id = f"{plan.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._context = context
        self._lease = lease
        self._timer = RequestTimer(context.metrics, plan.target.label, plan.received)
        self._choices: list[Choice] = []
        self._stream = Stream()
        self._open: dict[str, Choice] = {}  # by sequence
        self._waiting: Iterator[tuple[list[int], EchoedPrompt | None]] = iter(())  # prompts to be submitted
        self._uses: list[AdapterUse] = []

    def submit(self) -> None:
        """Submit the sequences of the plan. If it raises `EngineUnavailable`, none is left running."""
        plan = self.plan
        self._uses = [self._context.in_flight.use(name) for name in plan.target.names]
        for use in self._uses:
            use.requests += 1
            use.last_used = self.created
        try:
            self._waiting = zip(plan.prompts, self._echoes(), strict=True)
            self._submit_more()
        except BaseException:
            self.close()
            raise
        for use in self._uses:
            use.prompt_tokens += plan.prompt_tokens
        self._timer.submitted(plan.prompt_tokens)

    def _submit_more(self) -> None:
        while len(self._open) + self.plan.n <= MAX_OPEN and (next_one := next(self._waiting, None)) is not None:
            self._submit_prompt(*next_one)

    def _echoes(self) -> list[EchoedPrompt | None]:
        plan = self.plan
        if plan.output.echo is None:
            return [None] * len(plan.prompts)
        given = zip(plan.prompts, plan.output.echo, strict=True)
        return [EchoedPrompt.of(plan.tokenizer, prompt, text) for prompt, text in given]

    def _submit_prompt(self, prompt: list[int], echo: EchoedPrompt | None) -> None:
        plan, key, output = self.plan, self.plan.key, self.plan.output
        adapters, active_from = plan.target.adapters_for(prompt)
        stop_ids = frozenset((*self._context.info.eos_token_ids, *plan.sampling.stop_token_ids))
        for i in range(plan.n):
            index = len(self._choices)
            detokenizer = Detokenizer(
                plan.tokenizer,
                prompt,
                plan.stop,
                plan.sampling.min_tokens,
                include_stop=output.include_stop,
                skip_special=output.skip_special_tokens,
                shown=output.message_format.marks if output.message_format else (),
            )
            choice = Choice(
                index,
                detokenizer,
                stop_ids,
                include_stop=output.include_stop,
                echo=echo,
                num_logprobs=plan.sampling.logprobs,
                version=version_label(adapters),
                scores_end=output.token_ids or echo is not None or output.receipt is not None,
            )
            submit = Submit(
                f"{self.id}-{index}",
                prompt,
                _with_seed(plan.sampling, i),
                adapters,
                key.tenant,
                active_from,
                plan.priority,
                key.weight,
                plan.deadline,
                virtual_tokens=plan.target.traits.virtual_tokens,
                has_prefix=plan.target.traits.has_prefix,
                request_salt=plan.request_salt,
            )
            self._submit_choice(choice, submit)

    def _submit_choice(self, choice: Choice, submit: Submit) -> None:
        self._context.engine.submit(submit, self._stream)
        target = self.plan.target
        digests = frozenset(adapter.digest for adapter in target.adapters)
        self._context.in_flight.add_sequence(submit.seq_id, Running(target.names, digests, target.fixed))
        self._choices.append(choice)
        self._open[submit.seq_id] = choice

    def __len__(self) -> int:
        return len(self.plan.prompts) * self.plan.n

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Yield the new output of the choices until all have finished. Raises `ApiError` if one fails."""
        while self._open:
            deltas: dict[str, Delta] = {}
            failure = self._absorb(await self._stream.take(), deltas)
            if failure is None or deltas:
                yield self._account(list(deltas.values()))
            if failure is not None:
                raise self._api_error(failure) from failure
            self._submit_more()

    def _absorb(self, outputs: list[SequenceOutput], deltas: dict[str, Delta]) -> EngineFailure | None:
        """Add `outputs` to `deltas`, by sequence, up to the first failure, which is returned."""
        for output in outputs:
            choice = self._open.get(output.seq_id)
            if choice is None:  # ended by a stop string, which the engine does not know
                continue
            delta = deltas.get(output.seq_id) or Delta(choice.index)
            try:
                choice.absorb(output, delta)
            except EngineFailure as failure:
                return failure
            deltas[output.seq_id] = delta
            if choice.finished:
                self._note_finite()
                self._end([output.seq_id], abort=output.finish_reason is None)
        return None

    def _account(self, deltas: list[Delta]) -> list[Delta]:
        total = sum(len(delta.token_ids) for delta in deltas)
        for use in self._uses:
            use.generated_tokens += total
            use.rate.add(total)
        self._lease.generated(total)
        for delta in deltas:
            self._timer.tokens(delta.index, len(delta.token_ids), self._choices[delta.index].queue_seconds)
        return deltas

    def _end(self, seq_ids: list[str], *, abort: bool) -> None:
        if abort:
            self._context.engine.abort(seq_ids)
        for seq_id in seq_ids:
            del self._open[seq_id]
            self._context.in_flight.remove_sequence(seq_id)

    def _api_error(self, failure: EngineFailure) -> ApiError:
        if failure.reason == "abort":
            return self._abort_error()
        if failure.reason == "merged":
            return merged_error()
        if failure.reason == "nonfinite":
            return self._nonfinite_error(failure)
        if failure.reason == "refused":
            return bad_request(failure.message or "The request cannot be computed.", None, "unsupported")
        if failure.reason == "timeout":
            return ApiError(504, failure.message or "The request took too long.", code="deadline_exceeded")
        if self._context.engine.state is not EngineState.READY:
            return engine_unavailable(self._context.engine.state)
        no_room = room_error(self._context, self.plan.target.pages)  # adapters may have been pinned meanwhile
        if no_room is not None:
            return no_room
        failed = self._context.engine.residency.failed
        for name, digest in self.plan.target.versions:
            if digest in failed:
                return adapter_failed(name, failed[digest])
        return ApiError(500, failure.message, code="engine_error") if failure.message else server_error()

    def _nonfinite_error(self, failure: EngineFailure) -> ApiError:
        """Return a 422 if the request chose a scale or a sum; else count the failure of the adapter."""
        target = self.plan.target
        if len(target.adapters) == 1 and target.adapters[0].scale == 1:
            self._context.quarantine.failed(target.adapters[0].digest)
        elif target.adapters:
            scales = ", ".join(f"{adapter.scale:g}" for adapter in target.adapters)
            return ApiError(
                422,
                f"The numbers of '{target.requested_model}' are not finite with the scales {scales} of its adapters. "
                "Request smaller scales or other adapters.",
                code="scales_overflow",
                param="adapters" if len(target.adapters) > 1 else "adapter_scale",
            )
        return ApiError(500, failure.message or str(failure), code="engine_error")

    def _note_finite(self) -> None:
        adapters = self.plan.target.adapters
        if len(adapters) == 1 and adapters[0].scale == 1:
            self._context.quarantine.succeeded(adapters[0].digest)

    def _abort_error(self) -> ApiError:
        """Return a 404 if an adapter of the request was deleted, which a retry would meet again."""
        for name in self.plan.target.adapter_names:
            if name not in self._context.registry:
                return ApiError(
                    404,
                    f"The model '{self.plan.target.requested_model}' was deleted while the request ran.",
                    code="model_not_found",
                    param="model",
                )
        why = "before its prompt was computed" if self._context.accepting else "because the server is shutting down"
        return unavailable(f"The request was aborted {why}.", "aborted")

    def close(self) -> None:
        """Abort running sequences and release everything. May be called twice."""
        self._end(list(self._open), abort=bool(self._open))
        self._lease.close()
        self._timer.ended()

    def usage(self) -> UsageBody:
        prompt_tokens, completion = self.plan.prompt_tokens, sum(choice.num_tokens for choice in self._choices)
        cached = sum(choice.cached_tokens for choice in self._choices[:: self.plan.n])  # a prompt counts once
        return UsageBody(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion,
            total_tokens=prompt_tokens + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )


def _with_seed(sampling: SamplingParams, i: int) -> SamplingParams:
    """Give the i-th of n choices its own seed, so that the choices differ."""
    if i == 0 or sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + i) % (1 << 63))


def start_generation(context: AppContext, plan: GenerationPlan) -> Generation:
    """Charge a plan to its limits and submit it. Raises 429 if a key or an adapter is at its limits."""
    key, names = plan.key, plan.target.adapter_names
    lease = context.rate_limits.begin_request(key.sha256, key.limits, names, plan.prompt_tokens)
    generation = Generation(context, plan, lease)
    generation.submit()
    return generation


async def collect_output(request: Request, generation: Generation) -> list[Delta]:
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
