"""Linears over one input are found in the running model and computed as one; by name they are unchanged."""

from pathlib import Path

import pytest
import torch
from torch import nn

from adapters.kernels.reference import ReferenceKernel
from adapters.model_spec import ModelSpec
from adapters.runtime.layers import attach
from adapters.runtime.pool import AdapterPool
from adapters.runtime.stacked_linear import StackedLinear, is_stackable, stack
from tests.fixtures.engine_driver import make_driver
from tests.test_architectures import build

QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
FOUND = {
    "llama": {QKV, GATE_UP},
    "qwen3-norms": {QKV, GATE_UP},
    "gpt2-conv1d": set(),
    "phi3-fused": set(),
    "mixtral": {QKV},
}


class Siblings(nn.Module):
    """Two linears over one input, the second one also over another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> list[torch.Tensor]:
        extra = [] if other is None else [self.second(other), self.second(x)]
        return [self.first(x), self.second(x), *extra]


def attached(model: nn.Module) -> dict[str, nn.Module]:
    spec = ModelSpec({"first": (8, 6), "second": (8, 4)}, 16, siblings=(("first", "second"),))
    pool = AdapterPool(spec, 1, torch.float32, torch.device("cpu"), ReferenceKernel())
    return attach(model, spec, pool, None, lambda linear: linear)


@torch.inference_mode()
def test_a_stack_computes_the_outputs_of_its_linears() -> None:
    model = Siblings()
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    own = {name: (linear.weight.clone(), linear.bias) for name, linear in model.named_children()}
    before = model(x, other)
    bases = attached(model)
    for _ in range(2):
        for got, expected in zip(model(x, other), before, strict=True):
            torch.testing.assert_close(got, expected)
    for name, (weight, bias) in own.items():
        assert torch.equal(bases[name].weight, weight)
        assert (bases[name].bias is None) == (bias is None)


@torch.inference_mode()
def test_the_product_is_computed_once_for_all() -> None:
    model = Siblings()
    attached(model)
    calls = []
    stacked = model.first.group.base
    assert isinstance(stacked, StackedLinear)
    stacked.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 8)
    model(x)
    assert len(calls) == 1
    x += 1  # what was taken is not given out again, though the tensor is the same one
    torch.testing.assert_close(model(x)[0], stacked.members[0](x))
    assert len(calls) == 3


@torch.inference_mode()
def test_a_hook_on_one_of_them_runs() -> None:
    model = Siblings()
    bases = attached(model)
    x = torch.randn(3, 8)
    first, second = model(x)
    bases["second"].register_forward_hook(lambda _module, _args, output: output + 1)
    hooked = model(x)
    assert torch.equal(hooked[0], first) and torch.equal(hooked[1], second + 1)


@pytest.mark.parametrize("kind", FOUND)
def test_siblings_are_seen_in_the_running_model(kind: str, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "model")
    runner = make_driver(tmp_path / "model", tmp_path).engine._runner
    stacks = [group.names for group in runner.groups() if isinstance(group.base, StackedLinear)]
    assert {tuple(name.rpartition(".")[2] for name in names) for names in stacks} == FOUND[kind]
    assert all(len({name.rpartition(".")[0] for name in names}) == 1 for names in stacks)


def test_only_plain_linears_of_one_kind_are_stacked() -> None:
    class Special(nn.Linear):
        pass

    plain = nn.Linear(8, 8)
    assert is_stackable([plain, nn.Linear(8, 4)])
    assert not is_stackable([plain])
    assert not is_stackable([plain, Special(8, 8)])
    assert not is_stackable([plain, nn.Linear(8, 8, dtype=torch.bfloat16)])


def test_stacking_leaves_the_linears_as_they_are() -> None:
    linears = [nn.Linear(8, 8), nn.Linear(8, 4)]
    before = [linear.weight.clone() for linear in linears]
    stacked = stack(linears, lambda linear: linear)
    stacked.inner.weight.data.zero_()
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, before, strict=True))
