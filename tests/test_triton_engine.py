"""The whole engine on the Triton kernels, eagerly and over the buffers of graphs: the answers are those of the plain
implementations. CPU only, in Triton's interpreter."""

from pathlib import Path

import pytest
import torch

from tests.fixtures.triton_device import DEVICE, INTERPRETED, require_triton

require_triton()
if not INTERPRETED:
    pytest.skip("the engine of tests runs on a CPU, where only the interpreter can", allow_module_level=True)

from adapters.kernels.contract import LoRAKernel
from adapters.kernels.triton_lora import TritonKernel
from server.model import attention, runner
from server.model.attention import triton_paged
from server.model.batch import ForwardBatch
from server.model.fused.block_ops import TritonBlockOps
from server.model.graphs import DecodeGraphs, Replay, bucket_sizes
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.virtual_tokens import write_virtual

# Rows of a tile beyond its tokens see no key; numpy, in the interpreter, warns of their 0 / 0.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
PROMPTS = {
    "base": [5, 17, 42],
    "one": [9, 8, 7, 6, 5] * 4,
    "other": [3, 1, 4, 1, 5, 9],
    "P_TUNING": [4, 4, 8],
    "CARTRIDGE": [6, 7],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    model = tiny_llama(num_hidden_layers=1, initializer_range=0.3, hidden_size=32, intermediate_size=48)
    model.save_pretrained(folder / "model")
    write_adapter(model, folder / "one", r=8, scale=0.3, target_modules="all-linear")
    write_adapter(model, folder / "other", r=24, scale=0.3, seed=1, target_modules=["q_proj", "down_proj"])
    for name in ("P_TUNING", "CARTRIDGE"):
        write_virtual(model, folder / name, name, 19)
    return folder


def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*_: object) -> tuple[LoRAKernel, str]:
        return TritonKernel(DEVICE), "the test's"

    monkeypatch.setattr(runner, "choose_kernel", kernel)
    monkeypatch.setattr(runner, "block_ops", lambda *_: TritonBlockOps())
    monkeypatch.setattr(attention, "choose", lambda *_: (triton_paged.paged_attention, "the test's"))


def answers(driver: Driver, models: Path) -> dict[str, list[int]]:
    digests = {name: driver.add_adapter(models / name) for name in PROMPTS if name != "base"}
    for name, prompt in PROMPTS.items():
        driver.submit(name, prompt, digests.get(name), max_tokens=4)
    driver.run()
    return {name: driver.tokens(name) for name in PROMPTS}


@pytest.mark.slow
def test_the_engine_answers_as_on_the_plain_implementations(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answers(make_driver(models / "model", tmp_path / "plain"), models)
    on_triton(monkeypatch)
    driver = make_driver(models / "model", tmp_path / "triton")
    assert driver.engine._runner.pool.kernel.name == "triton"
    assert answers(driver, models) == plain
    for overlap in (False, True):
        driver = make_driver(models / "model", tmp_path / f"graphs-{overlap}")
        driver.engine.overlap = overlap
        graphs = with_graphs(driver)
        assert answers(driver, models) == plain
        stats = driver.steps[-1].stats
        assert (stats.graph_steps, stats.eager_steps) == (graphs.replayed, graphs.skipped)
        assert graphs.replayed >= 3 and set(graphs.skipped) == {"prefill"}


def with_graphs(driver: Driver) -> DecodeGraphs:
    """Graphs whose replay is the forward itself, after everything that the step brought along was overwritten: a graph
    reads its own buffers and nothing else."""
    made = driver.engine._runner
    kernel = made.pool.kernel
    assert isinstance(kernel, TritonKernel)
    step: list[ForwardBatch] = []

    class Watched(DecodeGraphs):
        def run(self, batch: ForwardBatch) -> torch.Tensor | None:
            step[:] = [batch]
            return super().run(batch)

    def capture(forward: Replay) -> Replay:
        def replay() -> torch.Tensor:
            (own,) = step
            for tensor in (own.input_ids, own.positions, own.slot_mapping):
                tensor.fill_(1)
            own.attention_plan = "not the graph's"
            return forward()

        forward()
        return replay

    made.graphs = Watched(made._forward, made.pool, made.groups(), kernel, bucket_sizes(8), 4, 16, DEVICE, capture)
    return made.graphs
