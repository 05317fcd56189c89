"""Reference for the self-test of an uploaded adapter: PEFT's formulas in float32, with no weights folded together.

It shares no code with the serving path (`pack`, `dora`, `scale_shift`, `module_overrides`, the kernels): a layer's
expected output is computed from the tensors as they are stored, by a hook on the base's own module.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from adapters.runtime.dora import dense_weight
from adapters.weights import AdapterWeights, LoraFactors


@dataclass(frozen=True, slots=True)
class ReferenceAdapter:
    """An adapter applied to the base's modules by name, while `active`."""

    weights: AdapterWeights
    bases: Mapping[str, nn.Module]
    magnitudes: Mapping[str, Tensor]  # DoRA's g by module, `[out]`

    @classmethod
    def of(cls, weights: AdapterWeights, bases: Mapping[str, nn.Module]) -> "ReferenceAdapter":
        """Build the reference. This takes the norms of whole weights, so do not call it on the engine's thread."""
        own = {name: weights.replaced.get(name, {}).get("weight") for name in weights.factors}
        norms = {
            name: factors.magnitude.float() / _norm(bases[name], own[name], factors)
            for name, factors in weights.factors.items()
            if factors.magnitude is not None
        }
        return cls(weights, bases, norms)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace every module's output with the expected output for the adapter alone, for all rows, until the
        context ends."""
        with ExitStack() as hooks:
            for name in self._touched():
                handle = self.bases[name].register_forward_hook(self._hook(name))
                hooks.callback(handle.remove)
            yield

    @property
    def num_virtual(self) -> int:
        """The number of virtual tokens in the probe prompt, which bounds its memory."""
        return 0 if self.weights.virtual is None else min(len(self.weights.virtual.values), MAX_PROBED_VIRTUAL)

    @property
    def has_prefix(self) -> bool:
        """Return True if the virtual tokens are keys and values."""
        return self.weights.virtual is not None and self.weights.virtual.is_prefix

    @contextmanager
    def in_front(self, embedding: nn.Module, keys: list[Tensor], values: list[Tensor]) -> Iterator[None]:
        """Put the virtual tokens in front of a sequence until the context ends: in its first rows of `embedding`, or in
        the first slots of `keys` and `values` `[blocks, size, kv heads, head_dim]` by layer."""
        virtual = self.weights.virtual
        if virtual is None:
            yield
        elif virtual.is_prefix:
            for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
                key.flatten(0, 1)[: self.num_virtual] = virtual.values[: self.num_virtual, layer, 0].to(key)
                value.flatten(0, 1)[: self.num_virtual] = virtual.values[: self.num_virtual, layer, 1].to(value)
            yield
        else:
            own = virtual.values[: self.num_virtual]
            hook = embedding.register_forward_hook(
                lambda _module, _args, output: torch.cat([own.to(output)[None], output[:, len(own) :]], dim=1)
            )
            try:
                yield
            finally:
                hook.remove()

    def _touched(self) -> set[str]:
        w = self.weights
        scales = (w.input_scales, w.output_scales, w.added_biases, w.reflections, w.projections)
        maps = (w.block_rotations, w.pair_rotations, w.sparse, w.circulant)
        return set().union(w.factors, w.biases, w.embeddings, w.parameters, w.replaced, w.tokens, *scales, *maps)

    def _hook(self, name: str) -> Any:
        base = self.bases[name]
        if isinstance(base, nn.Embedding):
            return lambda _module, args, output: self._embedding(name, base, args[0]).to(output.dtype)
        if isinstance(base, Conv1D) or hasattr(base, "in_features"):
            return lambda _module, args, output: self._linear(name, base, args[0], output)
        if name not in self.weights.replaced and _computes_one_by_one(base, self.weights.parameters.get(name, {})):
            return lambda _module, args, _output: self._experts(name, base, args)
        return lambda _module, args, _output: _with_parameters(base, self._parameters(name, base)).forward(*args)

    def _experts(self, name: str, base: nn.Module, args: Any) -> Tensor:
        """Compute stacked experts one after the other, as the class itself does without a faster implementation."""
        clone = _with_parameters(base, dict(base.named_parameters(recurse=False)))
        for key, factors in self.weights.parameters[name].items():
            vars(clone)[key] = _OneExpert(clone._parameters.pop(key), factors, getattr(base, "is_transposed", False))
        found: Tensor = type(base).forward.__wrapped__(clone, *args)  # type: ignore[attr-defined]
        return found

    def _linear(self, name: str, base: Any, x: Tensor, output: Tensor) -> Tensor:
        of = _on(x)
        own_bias = 0 if base.bias is None else base.bias.float()
        weight = self.weights.replaced.get(name, {}).get("weight")
        if (scale := self.weights.input_scales.get(name)) is not None:
            output = base.forward((x * of(scale)).to(x.dtype))  # not a call, which would run this hook again
        if (vectors := self.weights.reflections.get(name)) is not None:
            output = base.forward(_reflected(x.float(), of(vectors)).to(x.dtype))
        if (blocks := self.weights.block_rotations.get(name)) is not None:
            output = base.forward(_rotated(x.float(), of(blocks)).to(x.dtype))
        if weight is None:
            y = output.float() - own_bias
        else:
            whole = weight.T if isinstance(base, Conv1D) else weight
            y = torch.cat([linear(x.float(), of(rows)) for rows in torch.split(whole, REFERENCE_ROWS)], -1)
        y = y * of(self.weights.weight_scales.get(name, _ONE)) + self._delta(name, x, y.shape[-1])
        bias = self.weights.biases.get(name, self.weights.replaced.get(name, {}).get("bias"))
        if factors := self.weights.factors.get(name):
            delta = linear(linear(x.float(), of(factors.a)), of(factors.b))
            y = (y + factors.scaling * delta) * of(self.magnitudes.get(name, _ONE))
            if factors.bias is not None:
                y = y + factors.scaling * of(factors.bias)
        if projection := self.weights.projections.get(name):
            removed = linear(y, of(projection.right).T)  # of what the base alone gives
            y = y + linear(linear(x.float(), of(projection.filled)) - removed, of(projection.left))
        y = y + (own_bias if bias is None else of(bias))
        y = y + of(self.weights.added_biases.get(name, _ZERO))
        if rotation := self.weights.pair_rotations.get(name):
            y = of(rotation.first) * y + of(rotation.second) * _turned(y, rotation.half)
        if rows := self.weights.tokens.get(name):
            y[..., list(rows.ids)] = linear(x.float(), of(rows.values))
        return (y * of(self.weights.output_scales.get(name, _ONE))).to(output.dtype)

    def _delta(self, name: str, x: Tensor, outputs: int) -> Tensor:
        """Return what deltas that are no factors add, with the delta written out, or block by block."""
        if sparse := self.weights.sparse.get(name):
            whole = torch.zeros(outputs, x.shape[-1])
            whole.index_put_((sparse.indices[0], sparse.indices[1]), sparse.values.float(), accumulate=True)
            return linear(x.float(), _on(x)(whole))
        if (kernel := self.weights.circulant.get(name)) is not None:
            size = kernel.shape[2]
            shifts = (torch.arange(size)[None] - torch.arange(size)[:, None]) % size
            rows = [
                linear(x.float(), _on(x)(row[:, shifts].transpose(0, 1).reshape(size, -1))) for row in kernel.float()
            ]
            return torch.cat(rows, -1) / x.shape[-1]
        return _on(x)(_ZERO)

    def _embedding(self, name: str, base: nn.Embedding, ids: Tensor) -> Tensor:
        of = _on(ids)
        weight = self.weights.replaced.get(name, {}).get("weight", base.weight)
        y = of(embedding(ids.to(weight.device), weight))
        if rows := self.weights.tokens.get(name):
            for index, token in enumerate(rows.ids):
                y[ids == token] = of(rows.values[index])
        if factors := self.weights.embeddings.get(name):
            a, b = of(factors.a), factors.scaling * of(factors.b)
            y = y + embedding(ids, a.T) @ b.T
            if factors.magnitude is not None:
                y = y * (of(factors.magnitude) / of(self._embedding_norm(name, weight, factors)))
        return y * getattr(base, "embed_scale", 1)

    def _embedding_norm(self, name: str, weight: Tensor, factors: LoraFactors) -> Tensor:
        """Return the norm over the vocabulary of the embedding with its factors and tokens, in host memory."""
        whole = weight.cpu().float()
        if rows := self.weights.tokens.get(name):
            whole = whole.index_copy(0, torch.tensor(rows.ids), rows.values.float())
        delta = factors.scaling * factors.b.float() @ factors.a.float()
        norm: Tensor = torch.linalg.vector_norm(whole.T + delta, dim=1)
        return norm

    def _parameters(self, name: str, base: nn.Module) -> dict[str, Tensor]:
        """Return the parameters of a module that computes with its parameters directly: its own, or the adapter's. The
        factors are added to them, as PEFT's `ParamWrapper` does, in host memory."""
        own = dict(base.named_parameters(recurse=False))
        found: dict[str, Tensor] = {**own, **self.weights.replaced.get(name, {})}
        for key, factors in self.weights.parameters.get(name, {}).items():
            delta = _stacked_delta(own[key], factors, getattr(base, "is_transposed", False))
            found[key] = found[key].cpu().float() + delta
        return {key: value.to(own[key].dtype).to(own[key].device) for key, value in found.items()}


_ONE, _ZERO = torch.ones(()), torch.zeros(())
MAX_PROBED_VIRTUAL = 240  # virtual tokens of a self-test
REFERENCE_ROWS = 4096  # rows of a weight in float32 on the device at once; the memory plan counts them


def _on(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that moves tensors to the device of `like`, as float32."""
    return lambda tensor: tensor.to(like.device, torch.float32)


def _computes_one_by_one(base: nn.Module, factors: Mapping[str, LoraFactors]) -> bool:
    """Return True for factors of stacked experts whose class has a loop over experts, beneath transformers' choice of a
    faster implementation."""
    has_loop = hasattr(base, "is_transposed") and hasattr(type(base).forward, "__wrapped__")
    return has_loop and bool(factors) and all(getattr(base, key).dim() == 3 for key in factors)


class _OneExpert:
    """A parameter of stacked experts with an adapter's factors added, of which one expert at a time is in memory."""

    def __init__(self, weight: Any, factors: LoraFactors, transposed: bool) -> None:
        self._weight, self._factors, self._transposed = weight, factors, transposed

    def __getitem__(self, expert: Any) -> Tensor:
        own, factors, index = self._weight[expert], self._factors, int(expert)
        experts = len(self._weight)
        rank = factors.a.shape[0] // experts
        a = factors.a[index * rank : (index + 1) * rank].float()
        delta = factors.scaling * factors.b[:, index::experts].float() @ a
        found: Tensor = (own.float() + _on(own)(delta.T if self._transposed else delta)).to(own.dtype)
        return found


def _reflected(x: Tensor, vectors: Tensor) -> Tensor:
    """Return x reflected along each of the unit vectors, the last one first: `(W H₁ … Hᵣ) x`."""
    for vector in vectors.flip(0):
        x = x - 2 * (x @ vector)[..., None] * vector
    return x


def _rotated(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x with every block of channels multiplied by its matrix, or by the one that there is."""
    parts = torch.split(x, blocks.shape[-1], -1)
    return torch.cat([part @ blocks[index % len(blocks)] for index, part in enumerate(parts)], -1)


def _turned(y: Tensor, half: int) -> Tensor:
    """Return `(−y₂, y₁)` for the halves y₁ and y₂ of every `2 * half` channels."""
    parts = torch.split(y, half, -1)
    return torch.cat(
        [turned for first, second in zip(parts[::2], parts[1::2], strict=True) for turned in (-second, first)], -1
    )


def _with_parameters(base: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    """Return a copy of `base` with other parameters; a copy, because other threads may be reading the base."""
    clone = copy.copy(base)
    clone._parameters = {name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()}
    vars(clone).pop("forward", None)  # the class's own forward is the reference
    return clone


def _norm(base: nn.Module, own: Tensor | None, factors: LoraFactors) -> Tensor:
    weight = dense_weight(base) if own is None else own
    merged = weight.float().cpu() + factors.scaling * factors.b.float() @ factors.a.float()
    norm: Tensor = torch.linalg.vector_norm(merged, dim=1)
    return norm


def _stacked_delta(weight: Tensor, factors: LoraFactors, transposed: bool) -> Tensor:
    """Return the delta of a parameter, computed one expert after the other where experts are stacked."""
    if weight.dim() == 2:
        return factors.scaling * factors.b.float() @ factors.a.float()
    experts = weight.shape[0]
    rank = factors.a.shape[0] // experts
    deltas: list[Tensor] = [
        factors.b.float()[:, expert::experts] @ factors.a.float()[expert * rank : (expert + 1) * rank]
        for expert in range(experts)
    ]
    stacked = factors.scaling * torch.stack(deltas)
    return stacked.transpose(1, 2) if transposed else stacked
