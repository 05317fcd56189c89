"""What crosses between the API process and the engine: typed msgpack, never pickle."""

from collections.abc import Callable
from typing import Literal

import msgspec

from adapters.model_spec import ModelSpec
from server.sequence import SamplingParams, ScaledAdapter, TokenLogprobs

Tier = Literal["disk", "host", "device"]
# preparing: the merged weights are being computed; waiting: others finish; leaving: on the way back to the base's own
MergeState = Literal["none", "preparing", "waiting", "merged", "leaving"]
AskedBy = Literal["request", "policy"]
SwitchReason = Literal["request", "policy", "others", "retired"]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Start a sequence. Without `adapters` the base model answers; several add up, each with its scale. They see the
    tokens from `active_from` on. `weight` is of the tenant, `priority` counts within it (lower is more urgent)."""

    seq_id: str
    token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[ScaledAdapter, ...] = ()
    cache_salt: str = ""  # the tenant
    active_from: int = 0
    priority: int = 0
    weight: float = 1.0


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Drop these sequences; unknown ids are ignored. An aborted sequence gets one last output, reason "abort"."""

    seq_ids: list[str]


class MoveAdapter(msgspec.Struct, frozen=True, tag=True):
    """Bring a version up to `tier` ("host" or "device"), or down and out of both ("disk"). Answered by `Reply`."""

    request_id: int
    digest: str
    tier: Tier


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Protect a version from eviction, or no longer. Pinning loads it to the device. Answered by `Reply`."""

    request_id: int
    digest: str
    pinned: bool


class TryAdapter(msgspec.Struct, frozen=True, tag=True):
    """Compare a version's serving path with the reference arithmetic. Answered by `Reply` with a `SelfTest`."""

    request_id: int
    digest: str


class RetireAdapter(msgspec.Struct, frozen=True, tag=True):
    """No name points at the version any more: free its memory when its last sequence has ended. Not answered."""

    digest: str


class Merge(msgspec.Struct, frozen=True, tag=True):
    """Fold a version into the base's weights. With `drain`, what runs for others may finish first; without, their
    presence refuses it. `allow_requantize` permits a 4-bit base to stay 4-bit where memory is short. Answered by
    `Reply` once merged."""

    request_id: int
    digest: str
    drain: bool = False
    allow_requantize: bool = False


class Unmerge(msgspec.Struct, frozen=True, tag=True):
    """Put the base's own weights back, or give up a merge that has not happened yet. Answered by `Reply` once done."""

    request_id: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Abort everything and end the loop."""


ToEngine = Submit | Abort | MoveAdapter | PinAdapter | TryAdapter | RetireAdapter | Merge | Unmerge | Shutdown


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step did for one sequence. Every submitted sequence ends in exactly one with a `finish_reason`."""

    seq_id: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token id, when asked for
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    error: str | None = None  # a sentence for the client, with reason "error"


class AdapterMove(msgspec.Struct, frozen=True, array_like=True):
    """A version moved between tiers, or failed to. Evictions move down ("device" to "host", "host" to "disk")."""

    digest: str
    source: Tier
    target: Tier
    outcome: Literal["ok", "failed"]
    seconds: float
    error: str | None = None


class Residency(msgspec.Struct, frozen=True):
    """Which versions are where right now (digests)."""

    device: list[str] = []
    host: list[str] = []
    loading: list[str] = []
    pinned: dict[str, int] = {}  # digest to pages
    failed: dict[str, str] = {}  # digest to reason


class MergeStatus(msgspec.Struct, frozen=True):
    """Which version is in the base's weights, or on its way there or out of them."""

    state: MergeState = "none"
    digest: str | None = None
    asked_by: AskedBy | None = None
    requantized: bool = False  # a 4-bit base stayed 4-bit, at the price of rounding the merged weights to it


class MergeSwitch(msgspec.Struct, frozen=True, array_like=True):
    """A version went into the base's weights or out of them, and why."""

    digest: str
    direction: Literal["merge", "unmerge"]
    reason: SwitchReason


class EngineStats(msgspec.Struct, frozen=True):
    """Gauges and running totals, as of the end of a step."""

    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0  # referenced by running sequences
    blocks_total: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache, in all
    prefix_hits: int = 0  # of those, found
    preemptions: int = 0
    graph_steps: int = 0  # decode steps replayed as CUDA graphs, in all
    eager_steps: dict[str, int] = {}  # steps that the graphs do not cover, by reason
    slots_used: int = 0
    slots_pinned: int = 0
    slots_total: int = 0
    step_seconds: float = 0.0  # of this step
    batch_tokens: int = 0  # of this step
    batch_adapters: int = 0  # distinct adapters in this step
    running_adapters: list[str] = []
    waiting_adapters: list[str] = []


class EngineInfo(msgspec.Struct, frozen=True):
    """What the engine loaded; sent once, when it is ready."""

    base_fingerprint: str  # 12 hex digits over config, dtype, quantization and weights
    vocab_size: int
    max_model_len: int
    spec: ModelSpec
    adapter_slots: int
    adapter_pages: int  # of 16 rank columns, for the adapters in all slots together
    num_blocks: int
    block_size: int
    eos_token_ids: list[int]
    description: dict[str, str]  # device, dtype, quantization, attention, kernel: for logs and /version


class Ready(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Everything one step has to say, in one message. `residency` and `merge` come only when they changed."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    moves: list[AdapterMove] = []
    residency: Residency | None = None
    merge: MergeStatus | None = None
    switches: list[MergeSwitch] = []


class SelfTest(msgspec.Struct, frozen=True):
    """How far an adapter's logits are from those of the reference arithmetic. `relative_error` is the RMS difference in
    units of the logits' spread (NaN when they are not finite); more than `tolerance` is an error of ours."""

    max_abs_logit_diff: float
    relative_error: float
    tolerance: float


class Reply(msgspec.Struct, frozen=True, tag=True):
    """Answer to the request with that id; `error` is (code, sentence) when it failed."""

    request_id: int
    error: tuple[Literal["busy", "invalid", "not_found", "no_room", "not_mergeable"], str] | None = None
    selftest: SelfTest | None = None


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; `reason` is for the operator."""

    reason: str


FromEngine = Ready | StepOutputs | Reply | Fatal

Receive = Callable[[float], list[ToEngine]]  # waits so many seconds for a first message, then takes all there are
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
