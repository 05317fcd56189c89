"""Receipts: all that determines an output, and the output, so that `loraplex replay` can compute it again."""

import secrets
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import msgspec

from server.api.context import AppContext
from server.api.errors import bad_request
from server.api.inference.choices import Delta
from server.api.inference.targets import Target
from server.receipt_format import FORMAT, digest_of
from server.request import SamplingParams

_NUMERICS = ("device", "dtype", "quantization", "nf4_policy", "native_code", "attention", "lora_kernel")


def with_seed(sampling: SamplingParams) -> SamplingParams:
    """Give sampling parameters that draw tokens a seed. Raises 400 for what a receipt cannot hold."""
    if sampling.constraint is not None:
        raise bad_request("A constrained output has no receipt yet.", "receipt", "unsupported")
    if sampling.temperature == 0 or sampling.seed is not None:
        return sampling
    return msgspec.structs.replace(sampling, seed=secrets.randbits(62))


def begun_receipt(
    context: AppContext, target: Target, prompts: Sequence[list[int]], sampling: SamplingParams, stop: list[str], n: int
) -> dict[str, Any]:
    """Return a receipt without outputs: the base and how this server computes, versions, prompts, and sampling."""
    scales = dict(target.adapters)
    description = context.info.description
    return {
        "format": FORMAT,
        "model": target.requested_model,
        "base": context.info.base_fingerprint,
        "numerics": {name: description[name] for name in _NUMERICS if name in description},
        "adapters": [
            {"name": name, "version": f"sha256:{digest}", "scale": scales[digest]} for name, digest in target.versions
        ],
        "prompts": [list(prompt) for prompt in prompts],
        "n": n,
        "stop": stop,
        "sampling": {name: _in_json(getattr(sampling, name)) for name in sampling.__struct_fields__},
    }


def _in_json(value: Any) -> Any:
    return msgspec.to_builtins(value, str_keys=True)


def completed_receipt(begun: dict[str, Any], deltas: Iterable[Delta]) -> dict[str, Any]:
    """Return the receipt with the outputs, and the SHA-256 of all of it but that."""
    receipt = {**begun, "outputs": [_output(delta) for delta in sorted(deltas, key=attrgetter("index"))]}
    return {**receipt, "digest": digest_of(receipt)}


def _output(delta: Delta) -> dict[str, Any]:
    scores = delta.scores[-len(delta.token_ids) :] if delta.token_ids else []
    return {
        "token_ids": delta.token_ids,
        "versions": sorted(set(delta.versions)),  # two if a publication switched the response
        "finish_reason": delta.finish_reason,
        "logprobs": [score.logprobs.logprob for score in scores if score.logprobs is not None],  # if they were wanted
    }
