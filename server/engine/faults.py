"""Faults: which inputs the model cannot compute, and which exceptions end a request, or the whole engine. Imports torch
only to look at the device."""

from typing import TYPE_CHECKING

from server.ipc.messages import Reply
from server.request import SamplingParams

if TYPE_CHECKING:
    import torch

MAX_FAILED_STEPS = 8  # steps in a row of which no sequence could be computed, before the engine is restarted


class EngineBroken(Exception):
    """The engine cannot continue: its process ends, and the supervisor starts another."""


def is_lost(device: "torch.device") -> bool:
    """Return whether the device computes nothing any more. After some errors, such as a failed assertion in a kernel,
    every later call of CUDA fails as well, until the process ends."""
    if device.type != "cuda":
        return False
    import torch

    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def input_problem(token_ids: list[int], sampling: SamplingParams, vocab_size: int | None) -> str | None:
    """Return why the model cannot compute a sequence, or None. The API refuses such requests with a better message;
    in a kernel, an index outside the vocabulary would fail the whole step and, on a GPU, the process. `vocab_size` is
    None while the adapters' vocabulary is not known."""
    if not token_ids:
        return "the prompt is empty"
    smallest, largest = min(token_ids), max(token_ids)
    if sampling.logit_bias:
        smallest, largest = min(smallest, *sampling.logit_bias), max(largest, *sampling.logit_bias)
    if smallest < 0:
        return f"token {smallest} is not in the vocabulary"
    if vocab_size is not None and largest >= vocab_size:
        return f"token {largest} is not in the vocabulary of {vocab_size}"
    num_top = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
    if vocab_size is not None and num_top > vocab_size:
        return f"the vocabulary has {vocab_size} tokens and not {num_top}"
    return None


def failure_reply(request_id: int) -> Reply:
    """Return the reply to a request during which an unexpected exception was raised and logged."""
    return Reply(request_id, ("failed", "an unexpected error occurred in the engine; the server's log has details"))
