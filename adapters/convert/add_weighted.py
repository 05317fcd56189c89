"""Combination of several plain adapters into one, computed by PEFT's `add_weighted_adapter`.

PEFT receives no untrusted config or name: only a skeleton of numbered linears without weights, and a new config.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError
from adapters.weights import LoraFactors

Method = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
METHODS: tuple[Method, ...] = get_args(Method)
_SUM = "sum"  # PEFT's name for the result; the parts have numbers
Factors = dict[str, LoraFactors]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Options of a combination: `density` is the share of values that ties, dare and magnitude_prune keep, `rank`
    the rank of the result of the svd methods (default: the largest of the parts), `seed` the seed of dare's random
    choice. Raises `FolderError` for options that the method does not take."""

    method: Method
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        prunes = self.method.startswith(("ties", "dare", "magnitude_prune"))
        if prunes and (self.density is None or not 0 < self.density <= 1):
            raise FolderError(f"{self.method} needs a density above 0 and up to 1")
        if not prunes and self.density is not None:
            raise FolderError(f"{self.method} has no density")
        if self.rank is not None and (not self.method.endswith("svd") or self.rank < 1):
            raise FolderError("a rank of at least 1 can be given to the methods by svd only")


def combine(
    parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors, in float32, of the parts' weighted combination. Raises `FolderError` where
    the method does not apply to these parts."""
    if len(parts) < 2 and recipe.method not in ("linear", "cat"):
        raise FolderError(f"{recipe.method} needs two parts or more")  # PEFT would silently use linear
    sizes = _sizes(parts)
    if recipe.method != "cat" and not recipe.method.endswith("svd"):
        _check_ranks(parts)
    layers = _combined_by_peft(parts, weights, recipe, sizes)
    tensors: dict[str, Tensor] = {}
    for module, layer in zip(sizes, layers, strict=True):
        factors = layer.lora_A[_SUM].weight, layer.lora_B[_SUM].weight
        tensors.update(zip(plain_lora.pair_names(module), factors, strict=True))
    ranks = {module: len(layer.lora_A[_SUM].weight) for module, layer in zip(sizes, layers, strict=True)}
    return plain_lora.config_of({module: (rank, rank) for module, rank in ranks.items()}), tensors


def _sizes(parts: Sequence[Factors]) -> dict[str, tuple[int, int]]:
    """Return in_features and out_features of every module of any part."""
    sizes: dict[str, tuple[int, int]] = {}
    for part in parts:
        for module, factors in part.items():
            size = factors.a.shape[1], factors.b.shape[0]
            if sizes.setdefault(module, size) != size:
                raise FolderError(f"the parts are of different base models: {module} has different sizes")
    return dict(sorted(sizes.items()))


def _check_ranks(parts: Sequence[Factors]) -> None:
    """Check that each module has one rank in all parts. PEFT only compares the parts' largest ranks, but these
    methods add up module by module."""
    ranks: dict[str, int] = {}
    for part in parts:
        for module, factors in part.items():
            rank = len(factors.a)
            if ranks.setdefault(module, rank) != rank:
                raise FolderError(f"{module} has different ranks in the parts; cat and the methods by svd take them")


def _combined_by_peft(
    parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe, sizes: dict[str, tuple[int, int]]
) -> list[Any]:
    """Return PEFT's layers, one for each of `sizes`, with the combination under the name `_SUM`."""
    with torch.random.fork_rng(devices=[]):
        skeleton = nn.ModuleDict({_key(index): _weightless(*size) for index, size in enumerate(sizes.values())})
        model = _with_parts(skeleton, parts, list(sizes))
        torch.manual_seed(recipe.seed)
        try:
            model.add_weighted_adapter(
                [str(number) for number in range(len(parts))],
                list(weights),
                _SUM,
                combination_type=recipe.method,
                svd_rank=recipe.rank,
                svd_full_matrices=False,  # only the first columns are used
                density=recipe.density,
            )
        except ValueError as error:
            raise FolderError(str(error)) from error
    return list(skeleton.values())


def _with_parts(skeleton: nn.ModuleDict, parts: Sequence[Factors], modules: list[str]) -> Any:
    """Return PEFT's model of the skeleton, with the parts as adapters named by their numbers."""
    from peft import PeftModel

    model = PeftModel(skeleton, _peft_config(parts[0], modules), adapter_name="0")
    for number, part in enumerate(parts):
        if number:
            model.add_adapter(str(number), _peft_config(part, modules))
        _fill(skeleton, str(number), part, modules)
    return model


def _key(index: int) -> str:
    return f"m{index}"


def _weightless(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear whose weight is one number in memory. It is not on the meta device, to which PEFT would move
    the factors as well."""
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.zeros(()).expand(outputs, inputs), requires_grad=False)
    return linear


def _peft_config(part: Factors, modules: list[str]) -> Any:
    from peft import LoraConfig

    ranks = {_key(index): len(part[module].a) for index, module in enumerate(modules) if module in part}
    return LoraConfig(r=max(ranks.values()), target_modules=list(ranks), rank_pattern=ranks)


def _fill(skeleton: nn.ModuleDict, name: str, part: Factors, modules: list[str]) -> None:
    for index, module in enumerate(modules):
        if module in part:
            layer: Any = skeleton[_key(index)]
            layer.lora_A[name].weight.data = part[module].a.float()
            layer.lora_B[name].weight.data = part[module].b.float()
            layer.scaling[name] = part[module].scaling  # also for rslora, which PEFT would carry over to the result
