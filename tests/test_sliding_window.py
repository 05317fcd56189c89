"""KV blocks that fell out of the window of every layer: they are released while their sequence runs, and nothing else
changes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from server.engine.kv_blocks.sliding_blocks import SlidingBlocks
from server.request import SamplingParams
from server.sequence import NO_BLOCK, Sequence
from tests.fixtures.adapter_factory import greedy, with_peft, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.test_architectures import HEADS, SIZES, build
from tests.test_engine import assert_the_cache_is_finite

WINDOW = 40  # not a multiple of the 16 tokens of a block
BLOCKS_OF_WINDOW = -(-WINDOW // 16) + 2
BLOCK_BYTES = 4 * 2 * 2 * 16 * 4 * 16  # layers, keys and values, heads, head dimension, bytes, tokens


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**{**SIZES, **HEADS, "sliding_window": WINDOW, "max_position_embeddings": 512})
    return transformers.MistralForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistral")
    model.save_pretrained(root / "model")
    write_adapter(model, root / "adapter", target_modules="all-linear", r=4, scale=0.3)
    return root


class Windows:
    """Makes engines over the model whose layers all slide."""

    def __init__(self, folder: Path, data: Path, stack: ExitStack):
        self.adapter, self._model, self._data, self._stack = folder / "adapter", folder / "model", data, stack

    def make(self, release: bool = True, **settings: Any) -> Driver:
        driver = make_driver(self._model, self._data, **settings)
        self._stack.callback(driver.engine.close)
        blocks = driver.engine.scheduler.blocks
        assert isinstance(blocks, SlidingBlocks) and blocks.window == WINDOW
        if not release:
            blocks.window = 10_000
        return driver


@pytest.fixture
def windows(folder: Path, tmp_path: Path) -> Iterator[Windows]:
    with ExitStack() as stack:
        yield Windows(folder, tmp_path, stack)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 101, (length,), generator=generator).tolist()


def num_blocks(seq: Sequence) -> int:
    return len(seq.block_table) - seq.block_table.count(NO_BLOCK)


def most_blocks(driver: Driver) -> int:
    """Run to the end; the largest number of blocks that were taken after a step."""
    most = 0
    while driver.engine.has_work():
        driver.step()
        most = max([most, *map(num_blocks, driver.engine.scheduler.running)])
    return most


@pytest.mark.parametrize("overlap", [False, True])
def test_a_long_generation_holds_one_window(windows: Windows, model: PreTrainedModel, overlap: bool) -> None:
    driver = windows.make(max_batch_tokens=16)
    driver.engine.overlap = overlap
    digest = driver.add_adapter(windows.adapter)
    for length in (3, 150):
        driver.submit(f"base-{length}", prompt_of(length), max_tokens=200)
        driver.submit(f"lora-{length}", prompt_of(length), digest, max_tokens=200)
    assert most_blocks(driver) <= BLOCKS_OF_WINDOW
    tuned = with_peft(model, windows.adapter)
    for length in (3, 150):
        assert driver.tokens(f"base-{length}") == greedy(model, prompt_of(length), 200)
        assert driver.tokens(f"lora-{length}") == greedy(tuned, prompt_of(length), 200)
    assert driver.engine.scheduler.blocks.num_used == 0
    assert_the_cache_is_finite(driver)


def test_logprobs_have_the_same_bits_as_with_all_blocks(windows: Windows) -> None:
    seen = []
    for release in (True, False):
        driver = windows.make(release, max_batch_tokens=48)
        driver.submit("s", prompt_of(130), max_tokens=150, logprobs=3)
        assert (most_blocks(driver) <= BLOCKS_OF_WINDOW + 3) == release
        seen.append([output.logprobs for output in driver.outputs["s"]])
    assert seen[0] == seen[1]


def test_what_fell_out_of_the_window_is_not_needed_for_a_prefix_hit(windows: Windows, model: PreTrainedModel) -> None:
    """A second turn begins with a first one whose early blocks were given to another sequence."""
    driver = windows.make(kv_cache_bytes=32 * BLOCK_BYTES)
    prompt = prompt_of(30)
    driver.submit("turn 1", prompt, max_tokens=150)
    driver.run()
    second = [*prompt, *driver.tokens("turn 1"), *prompt_of(5, seed=1)]
    driver.submit("other", prompt_of(400, seed=2), max_tokens=1)
    driver.run()
    driver.submit("turn 2", second, max_tokens=20)
    driver.step()
    (turn,) = driver.engine.scheduler.running
    assert turn.num_cached_tokens == 176 and turn.block_table[0] == NO_BLOCK
    assert turn.block_hashes[0] not in driver.engine.scheduler.blocks._cached
    driver.run()
    assert driver.tokens("turn 2") == greedy(model, second, 20)


def test_preempted_sequences_give_the_tokens_they_would_alone(windows: Windows, model: PreTrainedModel) -> None:
    driver = windows.make(kv_cache_bytes=32 * BLOCK_BYTES, max_batch_tokens=32, max_num_seqs=12)
    for index in range(12):
        driver.submit(f"s{index}", prompt_of(20, index), max_tokens=100)
    driver.run()
    assert driver.steps[-1].stats.preemptions > 0
    for index in range(12):
        assert driver.tokens(f"s{index}") == greedy(model, prompt_of(20, index), 100)


def test_a_nan_that_left_the_window_unseen_is_never_read_again(windows: Windows) -> None:
    """It is in the last block of a prompt that the first sampled token does not see."""
    driver = windows.make(max_batch_tokens=16)
    driver.submit("clean", prompt_of(200), max_tokens=4)
    driver.run()
    again = windows.make(max_batch_tokens=16)
    again.submit("s", prompt_of(200), max_tokens=4)
    for _ in range(160 // 16):
        again.step()
    block = again.engine.scheduler.running[0].block_table[9]
    again.engine._runner.kv_cache.values[-1][block, 3] = float("nan")  # no later layer makes keys of what it spoils
    again.run()
    assert_the_cache_is_finite(again)
    again.submit("later", prompt_of(200), max_tokens=4)
    again.run()
    assert again.tokens("later") == driver.tokens("clean")


@pytest.mark.parametrize(
    ("kind", "window"), [("mistral-window", 8), ("qwen2-window", None), ("gemma2", None), ("llama", None)]
)
def test_blocks_are_kept_for_every_layer_that_reads_them(kind: str, window: int | None, tmp_path: Path) -> None:
    build(kind).save_pretrained(tmp_path / "model")
    blocks = make_driver(tmp_path / "model", tmp_path).engine.scheduler.blocks
    assert getattr(blocks, "window", None) == window


def test_a_long_sequence_is_admitted_into_the_room_of_its_window() -> None:
    blocks = SlidingBlocks(num_blocks=20, block_size=4, window=16, max_step_tokens=8)
    long = Sequence("s", list(range(400)), SamplingParams(max_tokens=8))
    assert blocks.can_admit(long, [])
    blocks.admit(long, [])
    while long.num_computed_tokens < 400:
        blocks.grow(long, long.num_computed_tokens + 8)
        blocks.commit(long, long.num_computed_tokens + 8)
        blocks.release_passed(long, long.num_computed_tokens)
        blocks.check_integrity([long])
    assert num_blocks(long) <= 16 // 4 + 1
