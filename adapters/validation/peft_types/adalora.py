"""AdaLoRA (https://arxiv.org/abs/2303.10512): `B diag(E) A`, of whose `init_r` ranks training keeps some.

The file has the kept ranks, while the scaling still uses the initial rank. `rank_pattern` differs from LORA's: it is a
mask of the kept ranks by `<layer>.lora_E`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from adapters.errors import Problem
from adapters.peft.config_reader import config_problem, shown
from adapters.validation.peft_types.base import Arrays, Factors, Layer, PeftTypeConfig, key_table

_SUFFIX = ".lora_E"
# PEFT's AdaLoRA ignores these keys of its config.
_IGNORED = {"alpha_pattern", "init_lora_weights", "qalora_group_size", "r", "runtime_config", "use_rslora"}
_TRAINING = {"beta1", "beta2", "deltaT", "eva_config", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"}


class AdaLora(PeftTypeConfig):
    """The kept ranks of every layer, with E folded into A."""

    peft_type = "ADALORA"
    keys = key_table(
        {"init_r", "lora_alpha", "rank_pattern", "layers_to_transform"},
        {"exclude_modules", "fan_in_fan_out", "layers_pattern", "lora_dropout"} | _IGNORED | _TRAINING,
        alora_invocation_tokens=(),
        arrow_config=(),
        bias=("none",),
        corda_config=(),
        ensure_weight_tying=(),
        kasa_config=(),
        layer_replication=(),
        loftq_config=(),
        lora_bias=(),
        lora_ga_config=(),
        megatron_config=(),
        megatron_core=("megatron.core",),
        monteclora_config=(),
        target_parameters=(),
        trainable_token_indices=(),
        use_bdlora=(),
        use_dora=(),
        use_qalora=(),
        velora_config=(),
    )
    kinds = frozenset({"lora_A", "lora_B", "lora_E"})

    def __init__(self, config: Mapping[str, Any]):
        super().__init__(config)
        self._init_r = self._rank("init_r", config.get("init_r", 12))
        self._scaling = self._alpha("lora_alpha", config.get("lora_alpha", 8)) / (self._init_r + 1e-5)
        self._left = self._ranks_left()

    def _ranks_left(self) -> dict[str, int]:
        """Return the number of kept ranks by layer."""
        pattern = self._config.get("rank_pattern") or {}
        left = {}
        for name, mask in pattern.items() if isinstance(pattern, dict) else [("", pattern)]:
            if name.endswith(_SUFFIX) and _is_mask(mask, self._init_r):
                left[name.removesuffix(_SUFFIX)] = sum(mask)
            else:
                expected = f"lists of {self._init_r} true or false by <layer>{_SUFFIX}"
                self._refuse(f"rank_pattern.{name}".rstrip("."), mask, expected, "malformed_file")
        return left

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        r = self.rank(layer)
        return {"lora_A": (r, layer.inputs), "lora_B": (layer.outputs, r), "lora_E": (r, 1)}

    def layer_problems(self, layers: Mapping[str, Layer]) -> Iterator[Problem]:
        for name in sorted(self._left.keys() - layers.keys()):
            found = f"{shown(name)} without a tensor"
            yield config_problem("rank_pattern", found, "tensors for every layer that it names", "no_target")

    def rank(self, layer: Layer) -> int:
        return self._left.get(layer.name, self._init_r)

    def convert(self, layer: Layer, tensors: Arrays, shared: Arrays) -> Factors:
        return Factors(tensors["lora_A"] * tensors["lora_E"], tensors["lora_B"], self._scaling)


def _is_mask(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(item, bool) for item in value)
