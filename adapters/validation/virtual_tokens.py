"""Adapters of virtual tokens, PEFT's prompt learning: tokens in front of every prompt, which are no token of a
vocabulary. The file has their input embeddings or, for a prefix, their keys and values in every layer.

PEFT saves what its encoders compute from their parameters (the MLP or LSTM of P-tuning, the projection of prefix
tuning, CPT's delta), so that no encoder has to run here. Only the prompt of multitask tuning is still to be multiplied.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters.errors import AdapterInvalid, Problem
from adapters.model_spec import ModelSpec
from adapters.peft.config_reader import (
    ConfigReader,
    KeyTable,
    config_problem,
)
from adapters.peft.digest import Scan, scan
from adapters.peft.foreign_files import GATHERED
from adapters.peft.lora_tensors import problem, rounding_notes
from adapters.peft.safetensors_header import FLOAT_BYTES, read_header, stored_bytes
from adapters.peft.tensor_bytes import largest_finite, read_array
from adapters.peft.typed_folder import read_typed
from adapters.traits import Traits

PROMPT, COLUMNS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
_COMMON = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"})
_FROM_TEXT = {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
_SIZES = frozenset({"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"})


@dataclass(frozen=True, slots=True)
class VirtualType:
    """One of PEFT's types: its config's keys, and whether its tokens are a prefix of keys and values."""

    keys: KeyTable
    is_prefix: bool = False

    @classmethod
    def of(cls, harmless: set[str], *served: str, is_prefix: bool = False) -> "VirtualType":
        refused = {"modules_to_save": (), "num_transformer_submodules": (1,)}
        keys = KeyTable(_SIZES | {"peft_type", "task_type", *served}, _COMMON | harmless, refused)
        return cls(keys, is_prefix)


_CPT_TRAINING = {
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "opt_weighted_loss_type",
    "tokenizer_name_or_path",
}
_P_TUNING_ENCODER = {"encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type"}
VIRTUAL_TYPES = {
    "PROMPT_TUNING": VirtualType.of(_FROM_TEXT),
    "P_TUNING": VirtualType.of(_P_TUNING_ENCODER),
    "MULTITASK_PROMPT_TUNING": VirtualType.of(
        _FROM_TEXT | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}, "num_ranks", "num_tasks"
    ),
    "CPT": VirtualType.of(_CPT_TRAINING, "cpt_token_ids"),
    "PREFIX_TUNING": VirtualType.of({"encoder_hidden_size", "init_weights", "prefix_projection"}, is_prefix=True),
    "CARTRIDGE": VirtualType.of({"num_frozen_tokens"}, is_prefix=True),
}


class VirtualConfig(ConfigReader):
    """The parsed config of one adapter. Call the methods that need a base model only if it is `usable`."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self.peft_type: str = config["peft_type"]
        self.type = VIRTUAL_TYPES[self.peft_type]
        self.num_tokens = self._num_tokens()
        is_multitask = self.peft_type == "MULTITASK_PROMPT_TUNING"
        self.num_ranks = self._rank("num_ranks", config.get("num_ranks", 1)) if is_multitask else 0
        if is_multitask and config.get("num_tasks", 1) != 1:
            expected = "1 task: a request cannot choose among several, so save each as an adapter"
            self._refuse("num_tasks", config["num_tasks"], expected, "unsupported_feature")
        if config.get("task_type") != "CAUSAL_LM":
            self._refuse("task_type", config.get("task_type"), '"CAUSAL_LM"', "unsupported_feature")

    def _num_tokens(self) -> int:
        """Return the number of virtual tokens; that of CPT is the length of the text which it started from."""
        if self.peft_type != "CPT":
            return self._rank("num_virtual_tokens", self._config.get("num_virtual_tokens"))
        text = self._config.get("cpt_token_ids")
        if not isinstance(text, list | None):
            self._refuse("cpt_token_ids", text, "a list of token ids", "malformed_file")
            return 1
        return self._rank("cpt_token_ids", 1 if text is None else len(text))

    def all_problems(self) -> list[Problem]:
        """Return the problems of the config's values and keys."""
        return self.problems + self.type.keys.problems(self._config)

    def shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that the file must have."""
        if self.type.is_prefix:
            return {PROMPT: (self.num_tokens, sum(2 * heads * size for heads, size in spec.kv))}
        hidden = _hidden(spec)
        shapes: dict[str, tuple[int, ...]] = {PROMPT: (self.num_tokens, hidden)}
        if self.num_ranks:
            shapes |= {COLUMNS: (1, self.num_tokens, self.num_ranks), ROWS: (1, self.num_ranks, hidden)}
        return shapes

    def base_problems(self, spec: ModelSpec) -> Iterator[Problem]:
        """Yield the sizes of the config that are not the base model's, by which PEFT takes the tensor apart."""
        expected = {"token_dim": _hidden(spec)}
        if self.type.is_prefix:
            if len(set(spec.kv)) != 1:
                expects = "a base model whose layers all have keys and values of one shape"
                yield config_problem("peft_type", self.peft_type, expects, "unsupported_feature")
                return
            heads, size = spec.kv[0]
            expected = {"token_dim": heads * size, "num_attention_heads": heads, "num_layers": len(spec.kv)}
        elif spec.rereads_tokens:  # and not from the embeddings that stand for them
            expects = "a base model that reads its tokens in the input embedding alone"
            yield config_problem("peft_type", self.peft_type, expects, "unsupported_feature")
        for key, number in expected.items():
            found = self._config.get(key)
            if found is not None and found != number:
                yield config_problem(key, found, f"{number}, as the base model has", "base_mismatch")

    def traits(self) -> Traits:
        """Return the traits of the adapter."""
        return Traits(additive=False, mergeable=False, virtual_tokens=self.num_tokens, has_prefix=self.type.is_prefix)


def _hidden(spec: ModelSpec) -> int:
    shape = spec.parameters.get(spec.embedding, {}).get("weight", (0, 0))
    return shape[-1]


def virtual_config_of(config: Mapping[str, Any]) -> VirtualConfig | None:
    """Return the parsed config of an adapter; None when its type is not one of `VIRTUAL_TYPES`."""
    peft_type = config.get("peft_type")
    return VirtualConfig(config) if isinstance(peft_type, str) and peft_type in VIRTUAL_TYPES else None


def read_virtual(folder: Path, spec: ModelSpec, known_digest: str | None = None) -> "Virtual | None":
    """Return the adapter in `folder`, validated against the base model; None when it is of another type.

    Raises `AdapterInvalid` with every problem. With `known_digest`, the weights are not read, and their numbers not
    checked.
    """
    return read_typed(folder, virtual_config_of, partial(Virtual, spec=spec, known_digest=known_digest))


class Virtual:
    """The tensors of a weights file with virtual tokens."""

    def __init__(self, path: Path, config: VirtualConfig, text: str, spec: ModelSpec, known_digest: str | None = None):
        self.config = config
        self._path, self._spec = path, spec
        self.tensors = read_header(path, FLOAT_BYTES, allow_empty=True)
        self._scanned = Scan(known_digest, {}) if known_digest else scan(text, self.tensors, path)

    @property
    def digest(self) -> str:
        """The version digest."""
        return self._scanned.digest

    def nbytes(self) -> int:
        """Return the size of all tensors in bytes, once they are loaded."""
        return sum(map(stored_bytes, self.tensors.values()))

    def notes(self) -> list[str]:
        """Return sentences for the report about what was read in another way than it was written."""
        return rounding_notes(self.tensors)

    def problems(self) -> list[Problem]:
        """Return every problem of the file."""
        found = list(self._value_problems())
        if not self.config.usable:
            return found
        unfit = list(self.config.base_problems(self._spec))
        return found + (unfit or list(self._shape_problems()))

    def _shape_problems(self) -> Iterator[Problem]:
        expected = self.config.shapes(self._spec)
        for name in sorted(self.tensors.keys() - expected.keys()):
            yield problem(name, "a tensor of another kind", f"{' and '.join(expected)} of {self.config.peft_type}")
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None or info.shape != shape:
                found = "no tensor" if info is None else str(list(info.shape))
                is_empty = info is not None and 0 in info.shape
                wanted = f"{list(shape)}, or {GATHERED}" if is_empty else str(list(shape))
                yield problem(name, found, wanted, "shape_mismatch")

    def _value_problems(self) -> Iterator[Problem]:
        for name, largest in self._scanned.magnitudes.items():
            if not largest <= largest_finite(self.tensors[name].dtype):
                yield problem(name, "NaN or infinity", "finite numbers", "nonfinite")

    def check_values(self) -> None:
        """Raise `AdapterInvalid` for what shows only once the tensors are multiplied."""
        if self.config.num_ranks:
            self.values()

    def values(self) -> NDArray[np.float32]:
        """Return the embeddings `[tokens, hidden]` or, for a prefix, the keys and values `[tokens, layers, 2, kv heads,
        head_dim]`. Raises `AdapterInvalid`."""
        own: NDArray[np.float32] = self._read(PROMPT)
        if self.config.type.is_prefix:
            return own.reshape(self.config.num_tokens, len(self._spec.kv), 2, *self._spec.kv[0])
        if self.config.num_ranks:
            with np.errstate(all="ignore"):  # what is not finite is a problem, not a warning
                own = own * (self._read(COLUMNS)[0] @ self._read(ROWS)[0])
            if not np.isfinite(own).all():
                found, expected = "NaN or infinity once multiplied out", "finite numbers"
                raise AdapterInvalid([problem(PROMPT, found, expected, "nonfinite")])
        return own

    def _read(self, name: str) -> NDArray[Any]:
        return read_array(self._path, self.tensors[name])
