"""Write the tables of `reference/compatibility.md` from the tests' case tables and the tables of keys: `make docs`."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from adapters.peft.config_keys import REFUSED_KEYS
from adapters.peft.lora_config import REFUSED_TYPES, SERVED_TYPES
from adapters.peft.lora_forms import LORA_FORMS
from adapters.validation.peft_types.convert import PEFT_TYPES
from adapters.validation.virtual_tokens import VIRTUAL_TYPES
from docs.tables import REFERENCE, Rows, render, table
from tests.fixtures.parity_cases import BASES, CASES, NOT_ON_NF4
from tests.fixtures.peft_corpus import CORPUS
from tests.fixtures.trainer_folders import LAYOUTS, answer_to, convert

DOCUMENT = REFERENCE / "compatibility.md"
EARLIER = "earlier names"
ENDS = {"lm_head", "embed_tokens"}
Settings = Mapping[str, Any]


def uses(*keys: str) -> Callable[[Settings], bool]:
    return lambda settings: any(settings.get(key) not in (None, False, "none", [], {}) for key in keys)


def is_type(peft_type: str) -> Callable[[Settings], bool]:
    return lambda settings: settings["peft_type"] == peft_type


def names(key: str, *wanted: str) -> Callable[[Settings], bool]:
    """Whether the list or expression under `key` has one of these in it."""
    return lambda settings: any(name in str(settings.get(key)) for name in wanted)


def saves(kind: str) -> Callable[[Settings], bool]:
    return lambda settings: kind in {saved_kind(name) for name in settings.get("modules_to_save") or ()}


def saved_kind(module: str) -> str:
    if module in ENDS:
        return "end"
    return "norm" if "norm" in module or module.startswith("ln_") else "linear"


FEATURES: dict[str, Callable[[Settings], bool]] = {
    "LoRA": is_type("LORA"),
    "rsLoRA": uses("use_rslora"),
    "`rank_pattern`, `alpha_pattern`": lambda s: s["peft_type"] == "LORA" and uses("rank_pattern", "alpha_pattern")(s),
    "`target_modules` as an expression": lambda s: "*" in str(s.get("target_modules")),
    "`layers_to_transform`, `exclude_modules`": uses("layers_to_transform", "exclude_modules"),
    "`init_lora_weights`: gaussian, orthogonal, EVA, MiCA": lambda s: isinstance(s.get("init_lora_weights"), str),
    "DoRA": uses("use_dora"),
    "`lora_bias`": uses("lora_bias"),
    "`bias`: `lora_only`, `all`": uses("bias"),
    "QA-LoRA": uses("use_qalora"),
    "aLoRA": uses("alora_invocation_tokens"),
    "factors of the output head": names("target_modules", "lm_head"),
    "factors of the input embedding": names("target_modules", "embed_tokens"),
    "saved embedding or head": saves("end"),
    "saved norms": saves("norm"),
    "saved linears and blocks": saves("linear"),
    "trained tokens": uses("trainable_token_indices"),
    "a vocabulary of its own": uses("vocab_size"),
    "a base whose embedding and head are tied": lambda s: s["base"] == "tied",
    "`target_parameters`: weights of linears": names("target_parameters", "_proj.weight"),
    "`target_parameters`: experts": names("target_parameters", "experts"),
    "`target_parameters`: the router": names("target_parameters", "gate.weight"),
    "experts and routers under the names of transformers 4": uses("earlier"),
    "Conv1D (`fan_in_fan_out`)": lambda s: s["base"] == "gpt2",
    "stored in fp16 or bf16": uses("stored"),
    **{name: is_type(name) for name in sorted({*SERVED_TYPES} - {"LORA"})},
}
REASONS = {
    "arrow_config": "routes every token among several adapters",
    "corda_config": "starts from a part of the base's weights, and takes it out of the base",
    "init_lora_weights": "all others take the start out of the base's weights",
    "kasa_config": "truncates the base's weights, and has a matrix between A and B",
    "layer_replication": "is for a base of other layers",
    "loftq_config": "quantises the base's weights anew",
    "lora_ga_config": "takes the start out of the base's weights",
    "megatron_config": "is for the layers of Megatron",
    "megatron_core": "is for the layers of another Megatron",
    "monteclora_config": "perturbs the factors at random",
    "use_bdlora": "has block-diagonal factors",
    "velora_config": "brings tensors of its own, for another backward pass",
}


def served_cases() -> Iterator[tuple[Settings, str, bool]]:
    """What each case says, the base's dtype, and whether the adapter is served there."""
    for kind, cases in CASES.items():
        for name, config in cases.items():
            for base in BASES:
                settings = {**settings_of(config, kind.split()[0].strip(",")), "earlier": kind.endswith(EARLIER)}
                yield settings, base, base != "nf4" or name not in NOT_ON_NF4
    for entry in CORPUS.values():
        if entry.if_refused is None:
            stored = str(entry.dtype) if entry.dtype.itemsize == 2 else None
            more = {"vocab_size": entry.vocab_size, "stored": stored}
            yield {**settings_of(entry.config, entry.base), **more}, "fp32", True


def settings_of(config: PeftConfig | dict[str, Any], base: str) -> Settings:
    return {"peft_type": "LORA", **(config if isinstance(config, dict) else config.to_dict()), "base": base}


def matrix() -> str:
    cases = list(served_cases())
    rows: Rows = []
    for feature, has in FEATURES.items():
        cells = [cell([served for settings, base, served in cases if base == b and has(settings)]) for b in BASES]
        rows.append((feature, *cells))
    return table(("what an adapter uses", *BASES), rows)


def cell(served: list[bool]) -> str:
    return (str(sum(served)) if any(served) else "refused") if served else "–"


def refused_keys() -> str:
    rows = []
    for key, values in REFUSED_KEYS.items():
        allowed = ", ".join(f"`{json.dumps(value)}`" for value in values) or "none"
        rows.append((f"`{key}`", allowed, REASONS[key], str(entries_naming(key))))
    return table(("key", "values that are served", "why no other", "in the corpus"), rows)


def types() -> str:
    served = ", ".join(f"`{name}`" for name in sorted(SERVED_TYPES))
    rows: Rows = [(f"{len(SERVED_TYPES)} of {len(PeftType)} are served", served)]
    rows += [(f"`{name}` is refused", f"It {reason}.") for name, reason in REFUSED_TYPES.items()]
    return table(("types of PEFT 0.21", ""), rows)


def refused_keys_of_types() -> str:
    tables = {name: config_class.keys for name, config_class in PEFT_TYPES.items()}
    tables |= {name: form.keys for name, form in LORA_FORMS.items()}
    tables |= {name: kind.keys for name, kind in VIRTUAL_TYPES.items()}
    rows: Rows = [
        (f"`{name}`", ", ".join(f"`{key}`" for key in sorted(keys.refused)))
        for name, keys in sorted(tables.items())
        if keys.refused
    ]
    return table(("type", "refused unless empty or without effect"), rows)


def refused_entries() -> str:
    """Of LoRA, for another reason than a key of the table above."""
    rows: Rows = [
        (name, f"`{entry.if_refused}`")
        for name, entry in CORPUS.items()
        if entry.if_refused not in (None, "peft_type", *REFUSED_KEYS) and isinstance(entry.config, dict)
    ]
    return table(("adapter of the corpus", "its refusal names"), rows)


def entries_naming(key: str) -> int:
    return sum(entry.if_refused == key for entry in CORPUS.values())


def trainer_folders() -> str:
    rows: Rows = []
    for name, make in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder, converted = Path(temporary) / "folder", Path(temporary) / "converted"
            make(folder)
            files = ", ".join(f"`{path.name}`" for path in sorted(folder.iterdir()))
            answer = answer_to(folder)
            if "loraplex convert" in answer:
                convert(folder, converted)
                answer += f" After it: {answer_to(converted)}."
            rows.append((name, files, answer))
    return table(("written by", "files", "the server says"), rows)


TABLES = {
    "trainer-folders": trainer_folders,
    "matrix": matrix,
    "types": types,
    "refused-keys": refused_keys,
    "refused-keys-of-types": refused_keys_of_types,
    "refused-entries": refused_entries,
}

if __name__ == "__main__":
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
