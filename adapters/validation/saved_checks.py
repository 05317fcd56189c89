"""Checks of token rows, and of the copies that PEFT writes of wrapped modules."""

from collections.abc import Iterator

from adapters.errors import Problem
from adapters.model_spec import ModelSpec
from adapters.peft.files import CONFIG_FILE
from adapters.peft.lora_config import LoraSettings
from adapters.peft.lora_tensors import LoraTensors, lost_modules, names_module, problem, token_target
from adapters.peft.targets import Targets
from adapters.peft.tensor_bytes import read_chunks

_KEY = f"{CONFIG_FILE}: trainable_token_indices"


def token_problems(tensors: LoraTensors, spec: ModelSpec, settings: LoraSettings) -> Iterator[Problem]:
    """Yield the problems of `trainable_token_indices` and of the rows stored for it."""
    vocab_size = tensors.vocab_size(spec) or spec.vocab_size or 0
    reached = set()
    for module, name in tensors.tokens.items():
        target, ids = token_target(module, settings, spec)
        reached.add(target)
        if target is None or module not in (spec.embedding, spec.head):
            yield problem(name, "rows of tokens that nothing declares", "those of trainable_token_indices")
        elif module in tensors.adapted():
            yield problem(name, "rows of a module that is also adapted", "one of the two, as in PEFT")
        elif ids and max(ids) >= vocab_size:
            below = (
                f"tokens below {vocab_size}, or the resized embedding and head in the file, which PEFT writes with "
                "save_pretrained(FOLDER, save_embedding_layers=True)"
            )
            yield problem(name, f"token {max(ids)}", below, "shape_mismatch")
        elif len(set(ids)) != len(ids):
            yield problem(_KEY, "a token twice", "each once", "malformed_file")
        elif tensors.infos[name].shape != (expected := (len(ids), spec.parameters[module]["weight"][1])):
            yield problem(name, str(list(tensors.infos[name].shape)), str(list(expected)), "shape_mismatch")
    for target in settings.token_indices.keys() - reached:
        if not _is_tied_away(target, spec, settings):
            missing = target or "the input embedding"
            yield problem(_KEY, f"{missing} without a tensor", "tensors for every target", "no_target")


def _is_tied_away(target: str, spec: ModelSpec, settings: LoraSettings) -> bool:
    """Return True if PEFT stores no rows for `target`: those of tied layers are stored once, with the embedding,
    when both declare the same tokens."""
    ids = settings.token_indices
    same = any(ids[target] == ids[other] for other in ids if names_module(other, spec.embedding))
    return spec.tied and same and names_module(target, spec.head)


def whole_problems(tensors: LoraTensors, spec: ModelSpec, targets: Targets) -> Iterator[Problem]:
    """Yield the problems of modules that are targeted as a whole, by LN_TUNING: PEFT wraps every module whose name
    matches. The ends of the vocabulary are refused: nothing says whether a tied weight would be that of both."""
    wrapped = targets.wrapped(spec.parameters, "", "")
    if lost := wrapped - tensors.saved.keys():
        yield lost_modules(lost)
    for module, names in tensors.saved.items():
        if module not in wrapped or module in (spec.embedding, spec.head):
            found = "a module beyond them" if module not in wrapped else "an embedding or a head"
            yield problem(
                next(iter(names.values())), found, "only norms and other modules of target_modules", "no_target"
            )
        for parameter in spec.parameters[module].keys() - names.keys():
            yield problem(
                next(iter(names.values())), f"no {parameter} beside it", "all of the module", "shape_mismatch"
            )


def copy_problems(tensors: LoraTensors) -> Iterator[Problem]:
    """Yield a problem for each copy that differs from its parameter, and for each unused weight without a saved
    module of the same shape."""
    for module, parameter, name in tensors.copies:
        if not _same_bytes(tensors, name, tensors.saved[module][parameter]):
            yield problem(name, "other numbers than the module's own", "a copy", "malformed_file")
    for module, parameter, name in tensors.unused:
        saved = tensors.saved.get(module, {}).get(parameter)
        if saved is None or tensors.infos[saved].shape != tensors.infos[name].shape:
            yield problem(name, "a weight without the one that takes its place", "both, of one shape")


def _same_bytes(tensors: LoraTensors, one: str, other: str) -> bool:
    infos = tensors.infos[one], tensors.infos[other]
    if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
        return False
    with tensors.path.open("rb") as first, tensors.path.open("rb") as second:
        chunks = zip(read_chunks(first, infos[0]), read_chunks(second, infos[1]), strict=True)
        return all(a == b for a, b in chunks)
