"""Several adapters on one sequence, scaled ones, and activated ones: in mixed batches, against PEFT alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import HRAConfig, OFTConfig, PeftConfig, RoadConfig, ShiraConfig

from server.ipc.messages import RetireAdapter
from server.request import ScaledAdapter
from tests.fixtures.adapter_factory import greedy, tiny_llama, with_peft, write_adapter, write_peft_adapter
from tests.fixtures.engine_driver import Driver, make_driver

ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4},
    "all": {"r": 24, "target_modules": "all-linear"},
    "head": {"r": 16, "target_modules": ["lm_head", "q_proj", "down_proj"], "use_rslora": True},
}
Weights = dict[str, float]
COMPOSITIONS: list[Weights] = [
    {"attention": 1.0, "all": 1.0},
    {"all": 0.6, "head": -0.8},
    {"head": 1.7, "attention": 0.3, "all": 0.5},
    {"attention": 0.0, "head": 1.0},
    {"all": 0.4},
    {"head": -1.0},
    {"attention": 1.0},
    {},
]
INVOCATION = [7, 11, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    made = {
        name: write_adapter(tiny_llama(), root / name, seed=seed, scale=0.2, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    # The same tensors twice: PEFT reads the invocation from the config, the engine is told where it is.
    for name, options in (("invoked", {"alora_invocation_tokens": INVOCATION}), ("always", {})):
        made[name] = write_adapter(tiny_llama(), root / name, seed=9, scale=0.2, r=8, **options)
    return made


@pytest.fixture
def driver(llama_folder: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make_driver(llama_folder, tmp_path, max_batch_tokens=40)
    yield made
    made.engine.residency.close()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(13, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def composed_by_peft(folders: dict[str, Path], weights: Weights) -> Any:
    """PEFT's sum has the config of the first, and is wrong when that says rslora: first is one that does not."""
    model, weights = tiny_llama(), weights and {"attention": 0.0} | weights
    if not weights:
        return model
    first, *others = weights
    tuned = with_peft(model, folders[first])
    for name in others:
        tuned.load_adapter(str(folders[name]), name)
    names = ["default", *others]
    tuned.add_weighted_adapter(names, list(weights.values()), "sum", combination_type="cat")
    tuned.set_adapter("sum")
    return tuned.eval()


def take(digests: dict[str, str], weights: Weights) -> tuple[ScaledAdapter, ...]:
    return tuple(ScaledAdapter(digests[name], scale) for name, scale in weights.items())


def logprobs_of(driver: Driver, seq_id: str) -> torch.Tensor:
    scores = [score for output in driver.outputs[seq_id] for score in output.logprobs or ()]
    return torch.tensor([score.logprob for score in scores])


def expected_logprobs(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def test_compositions_in_a_mixed_batch_are_those_of_peft(driver: Driver, folders: dict[str, Path]) -> None:
    """Prefilled in chunks, beside each other, plain adapters and the base."""
    digests = {name: driver.add_adapter(folders[name]) for name in ADAPTERS}
    driver.bring_to_device(*digests.values())
    prompts = [prompt_of(21 + 5 * index, seed=index) for index in range(len(COMPOSITIONS))]
    for index, (prompt, weights) in enumerate(zip(prompts, COMPOSITIONS, strict=True)):
        driver.submit(f"s{index}", prompt, take(digests, weights), logprobs=0)
    driver.run()
    for index, (prompt, weights) in enumerate(zip(prompts, COMPOSITIONS, strict=True)):
        tokens, model = driver.tokens(f"s{index}"), composed_by_peft(folders, weights)
        assert tokens == greedy(model, prompt, 8), weights
        expected = expected_logprobs(model, prompt, tokens)
        torch.testing.assert_close(logprobs_of(driver, f"s{index}"), expected, atol=1e-4, rtol=0)
        if weights:
            assert (expected - expected_logprobs(tiny_llama(), prompt, tokens)).abs().max() > 0.01
    assert max(step.stats.batch_adapters for step in driver.steps) == 3


OVERLAYS: dict[str, PeftConfig | dict[str, Any]] = {
    "saved head": {"r": 4, "modules_to_save": ["lm_head"]},
    "saved norm": {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["model.norm"]},
    "tokens": {"r": 4, "trainable_token_indices": [20, 30, 40]},
    "dora": {"r": 4, "target_modules": ["o_proj", "down_proj"], "use_dora": True},
    "oft": OFTConfig(oft_block_size=8, target_modules=["q_proj", "up_proj"]),
    "road": RoadConfig(group_size=8, target_modules=["q_proj", "down_proj"]),
    "shira": ShiraConfig(r=2, target_modules=["q_proj", "down_proj"]),
    "hra": HRAConfig(r=4, target_modules=["v_proj", "gate_proj"]),
}


def summed_by_hand(root: Path, weights: Weights) -> Any:
    """The base with the differences of all adapters, each merged by PEFT alone, times their scales; saved modules and
    tokens have none."""
    base, summed = tiny_llama(), tiny_llama()
    for name, scale in weights.items():
        own = with_peft(base, root / name).merge_and_unload()
        for key, parameter in own.named_parameters():
            is_whole = "norm" in key or key in ("lm_head.weight", "model.embed_tokens.weight")
            delta = parameter.data - base.get_parameter(key).data
            summed.get_parameter(key).data += delta * (1 if is_whole else scale)
    return summed


@pytest.mark.parametrize(
    "weights",
    [
        {"saved head": 1.0, "saved norm": 1.0, "all": 0.5},
        {"saved head": 0.7, "tokens": -0.6, "attention": 1.0},
        {"tokens": 1.0, "dora": 1.0, "all": -0.5},
        {"oft": 1.0, "all": 0.5, "hra": 1.0, "shira": 2.0},
        {"road": 1.0, "shira": -1.5, "attention": 1.0},
        {"shira": 0.5},
        {"saved head": 2.0},
    ],
    ids=" + ".join,
)
def test_adapters_with_overlays_compose_with_others(
    driver: Driver, tmp_path: Path, folders: dict[str, Path], weights: Weights
) -> None:
    root, base = tmp_path / "overlays", tiny_llama()
    for seed, (name, config) in enumerate(OVERLAYS.items()):
        if isinstance(config, PeftConfig):
            write_peft_adapter(base, root / name, config, seed=seed)
        else:
            write_adapter(base, root / name, seed=seed, scale=0.2, **config)
    for name in ADAPTERS:
        (root / name).symlink_to(folders[name])
    digests = {name: driver.add_adapter(root / name) for name in weights}
    prompt = prompt_of(30)
    driver.submit("sum", prompt, take(digests, weights), logprobs=0)
    driver.submit("base", prompt)
    driver.submit("one", prompt, next(iter(digests.values())))
    driver.run()
    tokens, model = driver.tokens("sum"), summed_by_hand(root, weights)
    expected = expected_logprobs(model, prompt, tokens)
    torch.testing.assert_close(logprobs_of(driver, "sum"), expected, atol=1e-4, rtol=0)
    assert tokens == greedy(model, prompt, 8) and driver.tokens("base") == greedy(base, prompt, 8)
    assert (expected - expected_logprobs(base, prompt, tokens)).abs().max() > 0.01
    driver.engine.check_integrity()


def test_rows_beside_a_composition_keep_their_bits(driver: Driver, folders: dict[str, Path]) -> None:
    """Plain and base rows, in batches of the same shape with and without compositions."""
    digests = {name: driver.add_adapter(folders[name]) for name in ADAPTERS}
    both = take(digests, {"all": 0.5, "head": 2.0})
    for turn, beside in (("warm", both), ("composed", both), ("base", ())):
        for index, adapters in enumerate([(), beside, beside, take(digests, {"attention": 1.0})]):
            driver.submit(f"{turn} {index}", prompt_of(5, seed=index), adapters, max_tokens=1, logprobs=5)
        driver.run()
    told = {seq_id: [output.logprobs for output in outputs] for seq_id, outputs in driver.outputs.items()}
    assert told["composed 0"] == told["base 0"] and told["composed 3"] == told["base 3"]
    assert told["composed 1"] != told["base 1"]


def test_the_order_of_a_composition_means_nothing(driver: Driver, folders: dict[str, Path]) -> None:
    digests = {name: driver.add_adapter(folders[name]) for name in ADAPTERS}
    weights, prompt = take(digests, {"all": 0.5, "head": 2.0}), prompt_of(40)
    for name, adapters in (("one", weights), ("other", weights[::-1]), ("scaled", weights[:1])):
        driver.submit(name, prompt, adapters)
        driver.run()
    cached = {name: driver.outputs[name][-1].num_cached_tokens for name in ("one", "other", "scaled")}
    assert cached == {"one": 0, "other": 32, "scaled": 0}
    assert driver.tokens("one") == driver.tokens("other")


def test_compositions_over_two_slots_all_end(llama_folder: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    driver = make_driver(llama_folder, tmp_path, adapter_slots=2, adapter_host_bytes=0)
    digests = {name: driver.add_adapter(folders[name]) for name in [*ADAPTERS, "always"]}
    pairs = [("attention", "all"), ("head", "always"), ("all", "head"), ("always", "attention"), ("head", "all")]
    for index, pair in enumerate(pairs * 2):
        driver.submit(f"s{index}", prompt_of(5, seed=index), take(digests, dict.fromkeys(pair, 0.5)), max_tokens=3)
    driver.submit("too many", prompt_of(5), take(digests, dict.fromkeys(ADAPTERS, 1.0)))
    driver.run()
    assert {driver.finish_reason(f"s{index}") for index in range(10)} == {"length"}
    (output,) = driver.outputs["too many"]
    assert output.finish_reason == "error" and "do not fit" in (output.error or "")
    driver.engine.residency.close()


def test_a_composition_ends_with_an_adapter_that_is_not_there(driver: Driver, folders: dict[str, Path]) -> None:
    digest = driver.add_adapter(folders["all"])
    driver.submit("broken", prompt_of(5), (ScaledAdapter(digest), ScaledAdapter("f" * 64)))
    driver.submit("fine", prompt_of(5), digest)
    driver.run()
    assert (driver.finish_reason("broken"), driver.finish_reason("fine")) == ("error", "length")


def test_a_retired_version_stays_for_the_compositions_it_is_in(driver: Driver, folders: dict[str, Path]) -> None:
    digests = {name: driver.add_adapter(folders[name]) for name in ADAPTERS}
    driver.submit("s", prompt_of(5), take(digests, {"all": 0.5, "head": 2.0}))
    driver.step()
    driver.engine.handle(RetireAdapter(digests["head"]))
    driver.run()
    assert driver.finish_reason("s") == "length"
    assert {name: driver.engine.residency.where(digests[name]) for name in ("all", "head")} == {
        "all": "device",
        "head": "disk",
    }


# -- activated LoRA ----------------------------------------------------------------------------------------------------


def last_invocation(prompt: list[int]) -> int:
    return max(at for at in range(len(prompt)) if prompt[at : at + len(INVOCATION)] == INVOCATION)


def invoked(before: int, after: int, seed: int = 0) -> list[int]:
    return [*prompt_of(before, seed), *INVOCATION, *prompt_of(after, seed + 50)]


PROMPTS = {
    "in the middle": invoked(37, 9),
    "at the start": invoked(0, 30),
    "at the end": invoked(33, 0),
    "twice": [*invoked(10, 5), *invoked(20, 4)],
    "overlapping": [*prompt_of(18), *INVOCATION, *INVOCATION[1:], *prompt_of(3)],
    "at a block's start": invoked(32, 6),
    "at a chunk's end": invoked(39, 6),
}


@pytest.mark.parametrize("alone", [True, False])
def test_an_activated_adapter_is_that_of_peft(driver: Driver, folders: dict[str, Path], alone: bool) -> None:
    digest, other = driver.add_adapter(folders["always"]), driver.add_adapter(folders["all"])
    model = with_peft(tiny_llama(), folders["invoked"])
    for name, prompt in PROMPTS.items():
        driver.submit(name, prompt, digest, active_from=last_invocation(prompt), logprobs=0)
        if alone:
            driver.run()
        else:
            driver.submit("base " + name, prompt)
            driver.submit("plain " + name, prompt, digest)
            driver.submit("other " + name, prompt, other)
    driver.run()
    always = with_peft(tiny_llama(), folders["always"])
    for name, prompt in PROMPTS.items():
        tokens = driver.tokens(name)
        expected = expected_logprobs_generating(model, prompt, tokens)
        torch.testing.assert_close(logprobs_of(driver, name), expected, atol=1e-4, rtol=0)
        assert tokens == greedy(model, prompt, 8)
        if not alone:
            assert driver.tokens("base " + name) == greedy(tiny_llama(), prompt, 8)
            assert driver.tokens("plain " + name) == greedy(always, prompt, 8)
        if last_invocation(prompt):  # it would show if the adapter saw the whole prompt
            assert (expected - expected_logprobs(always, prompt, tokens)).abs().max() > 1e-3


def expected_logprobs_generating(model: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """With the invocation that the prompt has, whatever has been generated since."""
    offset = len(prompt) + len(tokens) - last_invocation(prompt)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False, alora_offsets=[offset]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def test_an_activated_adapter_shares_the_base_s_prefix_and_gives_to_it(
    driver: Driver, folders: dict[str, Path]
) -> None:
    digest = driver.add_adapter(folders["always"])
    model = with_peft(tiny_llama(), folders["invoked"])
    for seed, order in ((1, ("base", "lora")), (2, ("lora", "base"))):
        prompt = invoked(60, 9, seed)
        for name in order:
            active_from = 60 if name == "lora" else 0
            driver.submit(f"{name} {seed}", prompt, digest if name == "lora" else None, active_from=active_from)
            driver.run()
        first, second = (driver.outputs[f"{name} {seed}"][-1].num_cached_tokens for name in order)
        assert (first, second) == (0, 48)  # three blocks of 16 lie before the 60th token
        assert driver.tokens(f"base {seed}") == greedy(tiny_llama(), prompt, 8)
        assert driver.tokens(f"lora {seed}") == greedy(model, prompt, 8)


def test_an_activated_adapter_survives_preemption(llama_folder: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    """Recomputed are generated tokens too, in chunks that may begin anywhere."""
    block_bytes = 2 * 2 * 2 * 16 * 4 * 16
    driver = make_driver(llama_folder, tmp_path, kv_cache_bytes=7 * block_bytes, max_batch_tokens=16, max_model_len=96)
    digest = driver.add_adapter(folders["always"])
    model = with_peft(tiny_llama(), folders["invoked"])
    for seed in range(3):
        driver.submit(f"s{seed}", invoked(20, 4, seed), digest, active_from=20, max_tokens=30)
    driver.run()
    assert driver.steps[-1].stats.preemptions > 0
    for seed in range(3):
        assert driver.tokens(f"s{seed}") == greedy(model, invoked(20, 4, seed), 30)
    driver.engine.residency.close()
