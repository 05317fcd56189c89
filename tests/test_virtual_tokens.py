"""Adapters of virtual tokens: every type is PEFT's `generate` in a mixed batch, and their blocks are shared."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from adapters.runtime import pack
from adapters.weights import VirtualTokens
from server.ipc.messages import Abort, RunSelfTest, Submit
from server.model.loading.loader import load_model
from server.model.loading.probe import probe
from server.model.sampling.token_counts import IN_PROMPT, TokenCounts
from server.request import SamplingParams
from server.sequence import Sequence
from tests.fixtures.adapter_factory import tiny_llama, with_peft, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver, plain
from tests.fixtures.timing import patience
from tests.fixtures.virtual_tokens import generated, virtual_configs, write_virtual
from tests.test_engine import BLOCK_BYTES, prompt_of
from tests.test_peft_parity import recorded

TYPES = list(virtual_configs(1))
PREFIXES = [name for name in TYPES if name.startswith(("PREFIX", "CARTRIDGE"))]
BLOCK, TOKENS, NEW_TOKENS = 16, 21, 6
ALL_LINEAR = {"target_modules": "all-linear", "r": 4, "scale": 0.2}


def base() -> nn.Module:
    return tiny_llama(initializer_range=0.2)


@dataclass
class World:
    """Engines over one base, and folders of adapters for it."""

    model: nn.Module
    folder: Path
    stack: ExitStack
    _logits: dict[int, dict[str, list[Tensor]]] = field(default_factory=dict)

    def adapter(self, name: str, tokens: int = TOKENS, seed: int = 0) -> Path:
        folder = self.folder / f"{name} {tokens} {seed}"
        if folder.exists():
            return folder
        if name in TYPES:
            return write_virtual(self.model, folder, name, tokens, seed)
        return write_adapter(self.model, folder, seed=seed, **ALL_LINEAR)

    def driver(self, **settings: Any) -> Driver:
        data_dir = self.folder / f"data {len(self._logits)}"
        driver = make_driver(self.folder / "model", data_dir, **settings)
        self.stack.callback(driver.engine.residency.close)
        self._logits[id(driver)] = recorded(driver)
        return driver

    def assert_is_peft(self, driver: Driver, seq_id: str, prompt: list[int], folder: Path | None) -> None:
        model = self.model if folder is None else with_peft(self.model, folder)
        tokens, logits = generated(model, prompt, NEW_TOKENS)
        assert driver.finish_reason(seq_id) == "length", driver.outputs[seq_id]
        assert driver.tokens(seq_id) == tokens
        assert (torch.stack(self._logits[id(driver)][seq_id]) - logits).abs().max() < 1e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, model = tmp_path_factory.mktemp("world"), base()
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    with ExitStack() as stack:
        yield World(model, folder, stack)


# -- parity ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_batch_tokens": 24}], ids=["whole", "chunked"])
def test_every_type_beside_loras_and_the_base_is_peft(world: World, settings: dict[str, Any]) -> None:
    driver = world.driver(adapter_slots=12, **settings)
    folders = {name: world.adapter(name) for name in [*TYPES, "lora"]}
    digests = {name: driver.add_adapter(folder) for name, folder in folders.items()}
    driver.bring_to_device(*digests.values())
    asked: dict[str, tuple[list[int], Path | None]] = {"base": (prompt_of(9), None)}
    for seed, (name, folder) in enumerate(folders.items()):
        asked |= {f"{name} short": (prompt_of(5, seed), folder), f"{name} long": (prompt_of(40, seed + 50), folder)}
    driver.submit("base", asked["base"][0], max_tokens=NEW_TOKENS)
    for seq_id, (prompt, folder) in asked.items():
        if folder is not None:
            driver.submit(seq_id, prompt, digests[seq_id.rpartition(" ")[0]], max_tokens=NEW_TOKENS)
    driver.run()
    for seq_id, (prompt, folder) in asked.items():
        world.assert_is_peft(driver, seq_id, prompt, folder)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 48])
@pytest.mark.parametrize("name", ["PROMPT_TUNING", "CARTRIDGE"])
def test_any_number_of_virtual_tokens_is_peft_and_so_is_a_second_request(world: World, name: str, tokens: int) -> None:
    driver = world.driver()
    folder = world.adapter(name, tokens)
    digest = driver.add_adapter(folder)
    for seq_id, prompt in {"first": prompt_of(20), "same": prompt_of(20), "other": prompt_of(3, 1)}.items():
        driver.submit(seq_id, prompt, digest, max_tokens=NEW_TOKENS)
        driver.run()
        world.assert_is_peft(driver, seq_id, prompt, folder)
    assert driver.outputs["first"][-1].num_cached_tokens == 0
    hit = (tokens + 19) // BLOCK * BLOCK
    assert driver.outputs["same"][-1].num_cached_tokens == max(hit - tokens, 0)


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
BASES: dict[str, Any] = {
    "learned positions": GPT2Config(
        vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, eos_token_id=2
    ),
    "positions by the mask": OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64),
    "scaled embeddings, soft caps": Gemma2Config(**GROUPED, sliding_window=8),
    "windows, two rotary bases": Gemma3TextConfig(**GROUPED, sliding_window=8),
    "a window in every layer": MistralConfig(**GROUPED, sliding_window=8),
    "norms of queries and keys": Qwen3Config(**GROUPED),
}


@pytest.mark.parametrize("kind", BASES)
def test_other_architectures_are_peft(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[kind], dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    with ExitStack() as stack:
        world = World(model, tmp_path, stack)
        driver = world.driver()
        for name in ("PROMPT_TUNING", "PREFIX_TUNING"):
            digest = driver.add_adapter(world.adapter(name))
            driver.submit(name, prompt_of(12), digest, max_tokens=NEW_TOKENS)
        driver.run()
        for name in ("PROMPT_TUNING", "PREFIX_TUNING"):
            world.assert_is_peft(driver, name, prompt_of(12), world.adapter(name))


@pytest.mark.parametrize("kind", ["llama", "gemma 3n"])
def test_a_base_that_reads_its_tokens_again_is_noticed(kind: str, tmp_path: Path) -> None:
    """Gemma 3n has an embedding per layer, which embeddings in place of tokens would leave out."""
    sizes = {**GROUPED, "num_kv_shared_layers": 0, "laurel_rank": 8, "hidden_size_per_layer_input": 8}
    layers = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2}
    config = Gemma3nTextConfig(**sizes, **layers, vocab_size_per_layer_input=97)
    model = base() if kind == "llama" else AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    _, spec = probe(load_model(str(tmp_path), "float32", "none", "cpu", 64), 8)
    assert spec.rereads_tokens == (kind == "gemma 3n")


def test_bfloat16_is_as_close_as_bfloat16_allows(world: World) -> None:
    driver = make_driver(world.folder / "model", world.folder / "data bf16", dtype="bfloat16", adapter_slots=4)
    world.stack.callback(driver.engine.residency.close)
    logits = recorded(driver)
    for name in ("P_TUNING", "CARTRIDGE"):
        driver.submit(name, prompt_of(12), driver.add_adapter(world.adapter(name)), max_tokens=1)
        driver.run()
        peft = with_peft(world.model, world.adapter(name))
        _, exact = generated(peft, prompt_of(12), 1)
        _, rounded = generated(peft.to(torch.bfloat16), prompt_of(12), 1)
        allowed = 2 * (rounded - exact).abs().max()
        assert (torch.stack(logits[name]).float() - exact).abs().max() < allowed


# -- scheduling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CPT", "CARTRIDGE"])
def test_preempted_sequences_go_on_as_before(world: World, name: str) -> None:
    """Two sequences of 21 virtual tokens, 12 of prompt and 40 of output do not fit into 8 blocks."""
    driver = world.driver(kv_cache_bytes=8 * BLOCK_BYTES, max_model_len=96)
    digest = driver.add_adapter(world.adapter(name))
    driver.bring_to_device(digest)
    for seq_id in ("a", "b"):
        driver.submit(seq_id, prompt_of(12, ord(seq_id)), digest, max_tokens=40)
    driver.run()
    assert driver.engine.scheduler.preemptions > 0
    for seq_id in ("a", "b"):
        tokens, _ = generated(with_peft(world.model, world.adapter(name)), prompt_of(12, ord(seq_id)), 40)
        assert driver.tokens(seq_id) == tokens


def test_a_prefix_is_copied_and_not_computed(world: World) -> None:
    driver = world.driver(max_batch_tokens=16)
    digest = driver.add_adapter(world.adapter("CARTRIDGE", 100))
    driver.bring_to_device(digest)
    before = len(driver.steps)
    driver.submit("first", prompt_of(7), digest, max_tokens=1)
    driver.run()
    assert [step.stats.batch_tokens for step in driver.steps[before:] if step.stats.batch_tokens] == [7]
    assert driver.finish_reason("first") == "length"


@pytest.mark.parametrize("name", ["P_TUNING", "PREFIX_TUNING"])
def test_all_requests_of_an_adapter_share_its_blocks_whatever_their_tenant(world: World, name: str) -> None:
    driver = world.driver(max_num_seqs=8)
    digest = driver.add_adapter(world.adapter(name, 64))
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)

    def submit(tenant: str) -> None:
        driver.engine.handle(
            Submit(tenant, prompt_of(20), params, plain(digest), tenant, virtual_tokens=64, has_prefix="PREFIX" in name)
        )

    submit("first")
    for _ in patience("its first token"):
        driver.step()
        if driver.outputs.get("first"):
            break
    submit("second")
    submit("third")
    driver.step()
    tables = {seq.seq_id: seq.block_table for seq in driver.engine.scheduler.running}
    assert tables["first"][:4] == tables["second"][:4] == tables["third"][:4]
    assert len({table[4] for table in tables.values()}) == 3  # the prompt is the tenant's own
    driver.run()
    assert driver.tokens("first") == driver.tokens("second") == driver.tokens("third")


def test_versions_of_a_name_do_not_share_blocks(world: World) -> None:
    driver = world.driver()
    folders = {seed: world.adapter("CARTRIDGE", 32, seed) for seed in (1, 2)}
    for seed, folder in folders.items():
        driver.submit(f"v{seed}", prompt_of(9), driver.add_adapter(folder), max_tokens=NEW_TOKENS)
    driver.run()
    for seed, folder in folders.items():
        world.assert_is_peft(driver, f"v{seed}", prompt_of(9), folder)
    assert driver.tokens("v1") != driver.tokens("v2")


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "CARTRIDGE"])
def test_blocks_of_a_step_that_failed_are_filled_again(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step fails for the guilty sequence, whose neighbour is computed again with its virtual tokens."""
    driver = world.driver()
    digest = driver.add_adapter(world.adapter(name, 40))
    driver.bring_to_device(digest)
    run = driver.engine._runner.run

    def failing(batch: Any, *more: Any) -> Tensor:
        logits = run(batch, *more)
        if any(int(rows.context_len) == 40 + 30 for rows in batch.sequences):
            driver.engine._runner.kv_cache.scrub(list(range(driver.info.num_blocks)))  # nothing of it is left
            raise RuntimeError("a kernel does not like this row")
        return logits

    monkeypatch.setattr(driver.engine._runner, "run", failing)
    driver.submit("guilty", prompt_of(30), digest, max_tokens=NEW_TOKENS)
    driver.submit("innocent", prompt_of(9), digest, max_tokens=NEW_TOKENS)
    driver.run()
    assert driver.finish_reason("guilty") == "error"
    tokens, _ = generated(with_peft(world.model, world.adapter(name, 40)), prompt_of(9), NEW_TOKENS)
    assert driver.tokens("innocent") == tokens


def test_an_aborted_prefill_leaves_nothing_behind(world: World) -> None:
    driver = world.driver(max_batch_tokens=16)
    digest = driver.add_adapter(world.adapter("CPT", 60))
    driver.bring_to_device(digest)
    driver.submit("a", prompt_of(9), digest, max_tokens=NEW_TOKENS)
    driver.step()
    driver.engine.handle(Abort(["a"]))
    driver.run()
    assert driver.engine.scheduler.blocks.num_used == 0
    driver.submit("b", prompt_of(9), digest, max_tokens=NEW_TOKENS)
    driver.run()
    world.assert_is_peft(driver, "b", prompt_of(9), world.adapter("CPT", 60))


@pytest.mark.parametrize("name", ["P_TUNING", "CARTRIDGE"])
def test_rows_beside_virtual_tokens_keep_their_bits(world: World, name: str) -> None:
    """As they are beside a prompt of the base that has as many rows in the step."""
    driver = world.driver()
    lora, own = driver.add_adapter(world.adapter("lora")), driver.add_adapter(world.adapter(name, 24))
    driver.bring_to_device(lora, own)
    rows = 9 if name == "CARTRIDGE" else 33

    def beside(neighbour: int, digest: str | None) -> list[object]:
        names = {f"base {digest}": None, f"lora {digest}": lora}
        for seq_id, adapter in names.items():
            driver.submit(seq_id, prompt_of(11), adapter, max_tokens=NEW_TOKENS, logprobs=3)
        driver.submit(f"neighbour {digest}", prompt_of(neighbour, 1), digest, max_tokens=NEW_TOKENS)
        driver.run()
        driver.engine.scheduler.blocks._cached.clear()  # no prefix is found by the others
        for block in driver.engine.scheduler.blocks._blocks:
            block.block_hash = None
        return [(out.token_ids, out.logprobs) for seq_id in names for out in driver.outputs[seq_id]]

    assert beside(rows, None) == beside(9, own)


def test_a_prefix_longer_than_the_window_finds_its_blocks(tmp_path: Path) -> None:
    """The whole prefix is copied in one step, and released once its tokens are beyond the window of every layer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES["a window in every layer"], dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    with ExitStack() as stack:
        world = World(model, tmp_path, stack)
        driver = world.driver(kv_cache_bytes=12 * BLOCK_BYTES, max_batch_tokens=16)
        folders = {seed: world.adapter("CARTRIDGE", 100, seed) for seed in range(3)}
        digests = {seed: driver.add_adapter(folder) for seed, folder in folders.items()}
        driver.bring_to_device(*digests.values())
        for seed, digest in digests.items():
            driver.submit(str(seed), prompt_of(4, seed), digest, max_tokens=NEW_TOKENS)
        driver.run()
        for seed, folder in folders.items():
            world.assert_is_peft(driver, str(seed), prompt_of(4, seed), folder)


def test_the_context_includes_virtual_tokens(world: World) -> None:
    driver = world.driver(max_model_len=64)
    digest = driver.add_adapter(world.adapter("CARTRIDGE", 48))
    driver.submit("to the end", prompt_of(10), digest, max_tokens=50)
    driver.submit("too long", prompt_of(17), digest)
    driver.run()
    assert len(driver.tokens("to the end")) == 6 and driver.finish_reason("to the end") == "length"
    assert "more than 16 tokens" in str(driver.outputs["too long"][-1].error)


@pytest.mark.parametrize("number", [0, TOKENS - 1])
def test_a_sequence_with_another_number_of_virtual_tokens_ends(world: World, number: int) -> None:
    """It would be served without them, or with the rows of another adapter."""
    driver = world.driver()
    digest = driver.add_adapter(world.adapter("P_TUNING"))
    driver.engine.handle(Submit("a", prompt_of(5), SamplingParams(4), plain(digest), virtual_tokens=number))
    driver.run()
    assert driver.outputs["a"][-1].error == f"the adapter has {TOKENS} virtual tokens, and the sequence {number}"
    assert driver.tokens("a") == []


def test_penalties_do_not_count_virtual_tokens() -> None:
    seq = Sequence("a", [0, 0, 0, 5, 5, 6], SamplingParams(max_tokens=1), num_virtual_tokens=3)
    _, _, entries = TokenCounts(torch.device("cpu")).prepare([seq], 8)
    assert entries[0].tolist() == [0, 0, 0, 0, 0, IN_PROMPT, IN_PROMPT, 0]


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_cartridges_in_little_memory(world: World, count: int) -> None:
    """Each keeps 2 layers x 2 x 40 tokens x 2 heads x 16 numbers: 20 KiB, of which the device has room for three."""
    each = 2 * 2 * 40 * 2 * 16 * 4
    driver = world.driver(adapter_slots=8, adapter_override_bytes=3 * each + 1, adapter_host_bytes=12 * each)
    folders = [world.adapter("CARTRIDGE", 40, seed) for seed in range(3)]
    digests = [driver.add_adapter(folder) for folder in folders]
    digests += [driver.add_adapter(variant(folders[0], world.folder / f"{i} of {count}", i)) for i in range(count)]
    assert len(set(digests)) == count + 3
    for index, digest in enumerate(digests):
        driver.submit(str(index), prompt_of(9), digest, max_tokens=2)
    while driver.engine.has_work():
        driver.step()
        kept = driver.engine._runner.pool.extra_bytes().values()
        assert sum(kept) <= 3 * each
        assert driver.engine.residency.host.nbytes <= 12 * each
    assert all(driver.finish_reason(str(index)) == "length" for index in range(count + 3))
    for index in range(len(folders)):  # evicted long ago
        driver.submit(f"again {index}", prompt_of(11), digests[index], max_tokens=NEW_TOKENS)
    driver.run()
    for index, folder in enumerate(folders):
        world.assert_is_peft(driver, f"again {index}", prompt_of(11), folder)


def variant(folder: Path, target: Path, number: int) -> Path:
    """The same adapter under another digest: its config tells another origin."""
    shutil.copytree(folder, target)
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"base {number}"}))
    return target


# -- the self-test -----------------------------------------------------------------------------------------------------


def selftested(driver: Driver, digest: str) -> Any:
    driver.engine.handle(RunSelfTest(1, digest))
    for _ in patience("the self-test"):
        driver.step()
        if 1 in driver.replies:
            return driver.replies[1]
    return None


@pytest.mark.parametrize("tokens", [TOKENS, 300])
@pytest.mark.parametrize("name", ["MULTITASK_PROMPT_TUNING", "PREFIX_TUNING"])
def test_the_selftest_finds_the_reference(world: World, name: str, tokens: int) -> None:
    driver = world.driver()
    reply = selftested(driver, driver.add_adapter(world.adapter(name, tokens)))
    assert reply.error is None and reply.selftest.relative_error < 1e-5


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "CARTRIDGE"])
def test_the_selftest_finds_values_in_the_wrong_place(world: World, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pack.pack_virtual

    def shifted(tokens: VirtualTokens, dtype: torch.dtype) -> VirtualTokens:
        packed = right(tokens, dtype)
        return replace(packed, values=packed.values.roll(1, 1 if packed.is_prefix else 0))

    monkeypatch.setattr(pack, "pack_virtual", shifted)
    driver = world.driver()
    reply = selftested(driver, driver.add_adapter(world.adapter(name)))
    assert reply.selftest.relative_error > reply.selftest.tolerance
