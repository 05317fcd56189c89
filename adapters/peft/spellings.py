"""Names of tensors that differ from PEFT's only in their spelling, as state dicts have them that PEFT did not save.

PEFT adapts nothing where it does not know a name, and serves the base model in silence. The harmless spellings:

| spelling | read as |
| --- | --- |
| `_orig_mod.`, `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.` anywhere, `module.` at the start | without it |
| no tensor of the file begins with `base_model.` | with `base_model.model.` in front |
| `base_model.model.base_model.model.` | `base_model.model.` |
| `lora_A.default.weight`, `lora_B.default.bias` | `lora_A.weight`, `lora_B.bias` |
| `lora_magnitude_vector.default`, `.weight` or both; `lora_embedding_A` and `_B` as well | without it |
| `trainable_tokens_delta.default`, `hada_w1_a.default` | without it |
| `modules_to_save.default.weight` | `modules_to_save.weight` |

`default` stands for any name of an adapter.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from adapters.peft.tensor_names import parse_tensor_name

PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTERMOST = "module"
_INFIX = re.compile(
    r"(?P<factor>lora_[AB])\.[^.]+(?P<rest>\.(?:weight|bias))|"
    r"(?P<vector>lora_magnitude_vector|lora_embedding_[AB]|trainable_tokens_delta)\.[^.]+(?:\.weight)?"
)
_SAVED = ".modules_to_save."


@dataclass(frozen=True, slots=True)
class Spellings:
    """`names` maps each name of a file to PEFT's name for it. `notes` are sentences for the report."""

    names: dict[str, str]
    notes: list[str]


def peft_names(names: Iterable[str], modules: Collection[str], kinds: Collection[str] = ()) -> Spellings:
    """Return PEFT's name for each of a file's `names`. A name that refers to one of the base model's `modules` keeps
    its prefix; `kinds` are the parameters of a type other than LORA."""
    counts: Counter[str] = Counter()
    found = {}
    unwrapped = {name: name if _refers(name, modules) else _without_wrappers(name, counts) for name in names}
    is_bare = not any(name.startswith("base_model.") for name in unwrapped.values())
    for name, short in unwrapped.items():
        full = short if _refers(short, modules) else _with_prefix(short, is_bare, counts)
        head, last = _split_infix(full, modules, kinds)
        if head + last != full:
            counts["the name of the adapter in them"] += 1
        found[name] = head + last
    notes = [
        f"the names of {count} tensors were read without {rule}" for rule, count in counts.items() if rule != PREFIX
    ]
    if counts[PREFIX]:
        notes.append(f"the names of {counts[PREFIX]} tensors were read with {PREFIX} in front, which PEFT writes")
    return Spellings(found, notes)


def repeated(names: dict[str, str]) -> dict[str, str]:
    """Return the names that spell a tensor again, each with the name that spelled the tensor first."""
    first: dict[str, str] = {}
    return {name: first[own] for name, own in names.items() if first.setdefault(own, name) != name}


def _refers(name: str, modules: Collection[str]) -> bool:
    """Return True if the name is one that PEFT could write for a module of the base model."""
    if not any(f"{part}." in name for part in (*_WRAPPERS, _OUTERMOST)) and not name.startswith(PREFIX * 2):
        return False  # no rule but that of infixes applies
    parsed = parse_tensor_name(name)
    return parsed is not None and parsed[0].replace(".base_layer", "") in modules


def _without_wrappers(name: str, counts: Counter[str]) -> str:
    if not name.startswith(_OUTERMOST) and not any(wrapper in name for wrapper in _WRAPPERS):
        return name
    parts = name.split(".")
    kept = [part for part in parts if part not in _WRAPPERS]
    for wrapper in {part for part in parts if part in _WRAPPERS}:
        counts[f"the wrapper {wrapper}"] += 1
    if kept[0] == _OUTERMOST:
        counts[f"the wrapper {_OUTERMOST}"] += 1
        while len(kept) > 1 and kept[0] == _OUTERMOST:
            kept = kept[1:]
    return ".".join(kept)


def _with_prefix(name: str, is_bare: bool, counts: Counter[str]) -> str:
    if is_bare:
        counts[PREFIX] += 1
        return PREFIX + name
    short = name
    while short.startswith(PREFIX * 2):
        short = short.removeprefix(PREFIX)
    if short != name:
        counts[f"the second {PREFIX}"] += 1
    return short


def _split_infix(name: str, modules: Collection[str], kinds: Collection[str]) -> tuple[str, str]:
    """Return the name without an adapter's name, as the module with its dot and the rest."""
    module, saved, rest = name.rpartition(_SAVED)
    if saved and "." in rest:
        infix, _, own = rest.partition(".")
        if f"{module.removeprefix(PREFIX)}.{infix}" in modules:
            return f"{module}{saved}", rest
        return (f"{module}.", own) if "." in own else (f"{module}{saved}", own)
    for kind in kinds:
        head, found, tail = name.rpartition(f".{kind}.")
        if found and "." not in tail and tail not in kinds:
            return f"{head}.", kind
    if kinds:
        return name, ""
    for match in _INFIX.finditer(name):
        if match.end() == len(name) and (match.start() == 0 or name[match.start() - 1] == "."):
            return name[: match.start()], match["vector"] or match["factor"] + match["rest"]
    return name, ""
