"""Messages between the API process and the engine: typed msgpack, never pickle."""

from collections.abc import Callable
from typing import Literal

import msgspec

from adapters.model_spec import ModelSpec
from adapters.tiers import AdapterMove, Tier
from server.base_tokenizer import BaseTokenizer
from server.request import SamplingParams, ScaledAdapter, TokenLogprobs

# preparing: computing the merged weights; waiting: requests of other models finish; leaving: restoring the base model
MergeState = Literal["none", "preparing", "waiting", "merged", "leaving"]
PauseMode = Literal["abort", "wait", "keep"]
AskedBy = Literal["request", "policy"]
SwitchReason = Literal["request", "policy", "others", "retired"]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a sequence. Without `adapters` it uses the base model; the deltas of several adapters add up, each with its
    scale. Adapters apply to tokens from `active_from` on. `weight` belongs to the tenant; `priority` orders sequences
    within the tenant (lower is more urgent). At `deadline`, in seconds of `time.monotonic`, which the processes of a
    machine share, the sequence ends with reason "timeout"; it never starts if it still waits then. `virtual_tokens` of
    the adapter come before `token_ids`; with `has_prefix`, their keys and values are copied."""

    seq_id: str
    token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[ScaledAdapter, ...] = ()
    cache_salt: str = ""  # the tenant
    active_from: int = 0
    priority: int = 0
    weight: float = 1.0
    deadline: float | None = None
    virtual_tokens: int = 0
    has_prefix: bool = False
    request_salt: str = ""  # keeps the prefix cache of a tenant's requests apart


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Abort these sequences; unknown ids are ignored. An aborted sequence gets one last output with reason "abort", or
    with "stopped" if what it has generated so far is to be its response."""

    seq_ids: list[str]
    keep_output: bool = False


class MoveAdapter(msgspec.Struct, frozen=True, tag=True):
    """Load a version to `tier` ("host" or "device"), or unload it from both ("disk"). An `urgent` load does not step
    aside for the steps that run meanwhile. Answered by `Reply`."""

    request_id: int
    digest: str
    tier: Tier
    urgent: bool = False


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Pin or unpin a version. Pinning loads it to the device and protects it from eviction. Answered by `Reply`."""

    request_id: int
    digest: str
    pinned: bool


class RunSelfTest(msgspec.Struct, frozen=True, tag=True):
    """Compare the logits of a version with the reference arithmetic. Answered by `Reply` with a `SelfTest`. With
    `verify` false, the sender has just hashed the stored files and the engine does not hash them again."""

    request_id: int
    digest: str
    verify: bool = True


class RetireAdapter(msgspec.Struct, frozen=True, tag=True):
    """Free the memory of a version without names once its last sequence has ended. Not answered."""

    digest: str


class SwitchAdapter(msgspec.Struct, frozen=True, tag=True):
    """Continue these sequences with the version `new` in place of `old`; unknown ids are ignored. Their tokens so far
    stay and are recomputed. Answered by `Reply`."""

    request_id: int
    seq_ids: list[str]
    old: str
    new: str


class Pause(msgspec.Struct, frozen=True, tag=True):
    """Run no more steps until `Resume`: at once (`keep`), once the sequences that exist have ended (`wait`), or once
    they were ended with the reason "stopped" (`abort`). Later sequences wait. Answered by `Reply` when paused."""

    request_id: int
    mode: PauseMode


class Resume(msgspec.Struct, frozen=True, tag=True):
    """End a pause. Answered by `Reply`."""

    request_id: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    """Forget all cached prefixes. Answered by `Reply`."""

    request_id: int


class Merge(msgspec.Struct, frozen=True, tag=True):
    """Merge a version into the base model. With `drain`, sequences of other models finish first; without, they cause a
    refusal. `allow_requantize` keeps a 4-bit base model in 4 bits if memory is short. Answered by `Reply` when done."""

    request_id: int
    digest: str
    drain: bool = False
    allow_requantize: bool = False


class Unmerge(msgspec.Struct, frozen=True, tag=True):
    """Restore the base model's own weights, or cancel a merge that is not complete. Answered by `Reply` once done."""

    request_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Abort all sequences and end the engine's loop."""


Call = MoveAdapter | PinAdapter | RunSelfTest | SwitchAdapter | Pause | Resume | ResetPrefixCache | Merge | Unmerge
ToEngine = Submit | Abort | RetireAdapter | Call | Shutdown


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """The output of one step for one sequence. Every sequence ends with exactly one output with a `finish_reason`."""

    seq_id: str
    token_ids: list[int]
    finish_reason: (
        Literal["stop", "length", "stopped", "abort", "timeout", "merged", "nonfinite", "error", "refused"] | None
    ) = None
    logprobs: list[TokenLogprobs] | None = None  # one per token id, if requested
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    error: str | None = None  # message for the client, with reasons "error", "nonfinite", "refused" and "timeout"
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first output: of all prompt tokens but the first
    embedding: bytes | None = None  # float32, with the last output, if `pooling` was asked for
    adapters: tuple[ScaledAdapter, ...] | None = None  # that computed this output and later ones, if they have changed


class ResidencyReport(msgspec.Struct, frozen=True):
    """The digests of the versions in each tier and state."""

    device: list[str] = []
    host: list[str] = []
    loading: list[str] = []
    pinned: dict[str, int] = {}  # digest to pages
    failed: dict[str, str] = {}  # digest to reason


class MergeStatus(msgspec.Struct, frozen=True):
    """The version that is merged into the base model, or is being merged or unmerged."""

    state: MergeState = "none"
    digest: str | None = None
    asked_by: AskedBy | None = None
    requantized: bool = False  # the merged weights of a 4-bit base model were rounded to 4 bits


class MergeSwitch(msgspec.Struct, frozen=True, array_like=True):
    """A version was merged into the base model or unmerged, with the reason."""

    digest: str
    direction: Literal["merge", "unmerge"]
    reason: SwitchReason


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges and running totals at the end of a step."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0  # referenced by running sequences
    blocks_total: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, in total
    prefix_hits: int = 0  # prompt tokens found in the prefix cache, in total
    preemptions: int = 0
    graph_steps: int = 0  # decode steps run as CUDA graphs, in total
    eager_steps: dict[str, int] = {}  # steps run without CUDA graphs, by reason
    slots_used: int = 0
    slots_pinned: int = 0
    slots_total: int = 0
    step_seconds: float = 0.0  # of this step
    batch_tokens: int = 0  # of this step
    batch_adapters: int = 0  # distinct adapters in this step
    running_adapters: list[str] = []
    waiting_adapters: list[str] = []


class EngineInfo(msgspec.Struct, frozen=True):
    """Description of the loaded model, sent once when the engine is ready."""

    base_fingerprint: str  # 12 hex digits over config, dtype, quantization and weights
    vocab_size: int
    max_model_len: int
    spec: ModelSpec
    adapter_slots: int
    adapter_pages: int  # pages of 16 rank columns, shared by the adapters in all slots
    num_blocks: int
    block_size: int
    eos_token_ids: list[int]
    description: dict[str, str]  # device, dtype, quantization, attention, kernel: for logs and /version
    tokenizer: BaseTokenizer | None = None  # None in engines that serve no text


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """All outputs and changes of one step. `residency` and `merge` are set only if they changed."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    moves: list[AdapterMove] = []
    residency: ResidencyReport | None = None
    merge: MergeStatus | None = None
    switches: list[MergeSwitch] = []


class SelfTest(msgspec.Struct, frozen=True):
    """The difference between an adapter's logits and the reference arithmetic. `relative_error` is the RMS difference
    relative to the logits' spread (NaN if they are not finite); above `tolerance`, the server computes wrongly."""

    max_abs_logit_diff: float
    relative_error: float
    tolerance: float


class Reply(msgspec.Struct, frozen=True, tag=True):
    """Reply to the request with this id; `error` is (code, message) if the request failed, with the code "failed" if
    the engine raised an unexpected exception."""

    request_id: int
    error: tuple[Literal["busy", "invalid", "not_found", "no_room", "not_mergeable", "failed"], str] | None = None
    selftest: SelfTest | None = None


class Progress(msgspec.Struct, frozen=True, tag=True):
    """The engine is in a long step, of which a layer has begun."""


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or continue; `reason` is for the operator."""

    reason: str


FromEngine = Ready | StepOutputs | Reply | Progress | Fatal

Receive = Callable[
    [float], list[ToEngine]
]  # waits this many seconds for a first message, then returns all queued messages
Emit = Callable[[FromEngine], None]

_encoder = msgspec.msgpack.Encoder()
_to_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    return _to_decoder.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    return _from_decoder.decode(data)
