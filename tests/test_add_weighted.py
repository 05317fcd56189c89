"""Weighted combinations of adapters: equal to PEFT's on a real model, and served by the engine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.convert import peft_folder as plain_lora
from adapters.convert.add_weighted import METHODS, Factors, Method, Recipe, combine
from adapters.convert.folders import FolderError
from adapters.load import load
from tests.fixtures.adapter_factory import spec_of, tiny_llama, with_peft, write_adapter
from tests.fixtures.engine_driver import make_driver

WEIGHTS = [0.7, -0.4]
PATTERNS: dict[str, Any] = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("parts"), tiny_llama()
    write_adapter(model, folder / "a", scale=0.3)
    write_adapter(model, folder / "b", scale=0.3, seed=1, lora_alpha=5)
    write_adapter(model, folder / "patterns", scale=0.3, seed=2, **PATTERNS)
    write_adapter(model, folder / "small", scale=0.3, seed=3, r=4, target_modules=["v_proj"])
    write_adapter(model, folder / "elsewhere", scale=0.3, seed=5, r=4, target_modules=["o_proj", "q_proj"])
    write_adapter(model, folder / "only q", r=8, target_modules=["q_proj"])
    write_adapter(model, folder / "rslora", scale=0.3, seed=4, use_rslora=True)
    write_adapter(model, folder / "dora", use_dora=True)
    write_adapter(tiny_llama(attention_bias=True), folder / "bias", lora_bias=True)
    write_adapter(tiny_llama(hidden_size=32), folder / "other base")
    model.save_pretrained(folder / "model")
    return folder


def parts(folder: Path, *names: str) -> list[Factors]:
    return [plain_lora.read(folder / name) for name in names]


def deltas(folder: Path) -> dict[str, Tensor]:
    """The delta of each module's weight for the adapter in `folder`, as the server reads it."""
    factors = load(folder, spec_of(tiny_llama())).factors
    return {module: f.scaling * f.b.float() @ f.a.float() for module, f in factors.items()}


def by_peft(folder: Path, into: Path, names: list[str], recipe: Recipe) -> Path:
    model: Any = with_peft(tiny_llama(), folder / names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), name)
    torch.manual_seed(recipe.seed)
    model.add_weighted_adapter(
        ["default", *names[1:]],
        WEIGHTS,
        "sum",
        combination_type=recipe.method,
        density=recipe.density,
        svd_rank=recipe.rank,
    )
    model.save_pretrained(into, selected_adapters=["sum"])
    return into / "sum"


def density(method: Method) -> float | None:
    return 0.6 if method.startswith(("ties", "dare", "magnitude")) else None


@pytest.mark.parametrize("names", [("a", "b"), ("a", "small"), ("patterns", "small")])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_peft_s(method: Method, names: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    rank = 5 if method.endswith("svd") else None
    recipe = Recipe(method, density(method), rank, seed=7)
    if "small" in names and not (method == "cat" or method.endswith("svd")):
        with pytest.raises(FolderError, match="rank"):
            combine(parts(folder, *names), WEIGHTS, recipe)
        return
    plain_lora.save(tmp_path, *combine(parts(folder, *names), WEIGHTS, recipe))
    expected = deltas(by_peft(folder, tmp_path / "peft", list(names), recipe))
    found = deltas(tmp_path)
    assert found.keys() == expected.keys()
    for module, delta in found.items():
        torch.testing.assert_close(delta, expected[module], atol=1e-5, rtol=1e-4, msg=f"{method} {module}")


@pytest.mark.parametrize("names", [("patterns", "elsewhere"), ("rslora", "a"), ("a", "rslora")])
def test_cat_is_the_weighted_sum(names: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    """With rslora first, PEFT itself scales the sum once more."""
    plain_lora.save(tmp_path, *combine(parts(folder, *names), WEIGHTS, Recipe("cat")))
    first, second = (deltas(folder / name) for name in names)
    for module, delta in deltas(tmp_path).items():
        zero = torch.zeros(())
        expected = WEIGHTS[0] * first.get(module, zero) + WEIGHTS[1] * second.get(module, zero)
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)


def test_unequal_ranks_inside_equal_largest_ones_add_up_by_module(folder: Path, tmp_path: Path) -> None:
    """The file says the ranks that its tensors have; PEFT's own does not.

    Linear adds √weight times A, and likewise B: of the same part twice there is 2 · √0.25 · 2 · √0.25.
    """
    plain_lora.save(tmp_path, *combine(parts(folder, "patterns", "patterns"), [0.25, 0.25], Recipe("linear")))
    torch.testing.assert_close(deltas(tmp_path), deltas(folder / "patterns"))
    ranks = {len(f.a) for f in load(tmp_path, spec_of(tiny_llama())).factors.values()}
    assert ranks == {3, 8}


def test_half_precision_parts_and_one_part_alone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    (tmp_path / "made").mkdir()
    plain_lora.save(tmp_path / "made", *combine(parts(tmp_path, "half"), [-2.0], Recipe("cat")))
    expected = {module: -2 * delta for module, delta in deltas(tmp_path / "half").items()}
    torch.testing.assert_close(deltas(tmp_path / "made"), expected, atol=1e-5, rtol=1e-4)


def test_dare_chooses_by_its_seed_alone(folder: Path) -> None:
    def made(seed: int) -> dict[str, Tensor]:
        return combine(parts(folder, "a", "b"), WEIGHTS, Recipe("dare_linear", 0.5, seed=seed))[1]

    state = torch.get_rng_state()
    first, again, other = made(1), made(1), made(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_engine_serves_the_sum(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    plain_lora.save(tmp_path / "made", *combine(parts(folder, "patterns", "elsewhere"), WEIGHTS, Recipe("cat")))
    driver = make_driver(folder / "model", tmp_path / "data")
    digest = driver.add_adapter(tmp_path / "made")
    model = tiny_llama()
    for name, weight in zip(("patterns", "elsewhere"), WEIGHTS, strict=True):
        for module, delta in deltas(folder / name).items():
            model.get_submodule(module).weight.data += weight * delta
    prompt = list(range(5, 30))
    driver.submit("sum", prompt, digest, max_tokens=12)
    driver.submit("base", prompt, None, max_tokens=12)
    driver.run()
    for _ in range(12):
        with torch.no_grad():
            prompt.append(int(model(input_ids=torch.tensor([prompt])).logits[0, -1].argmax()))
    assert driver.tokens("sum") == prompt[-12:] != driver.tokens("base")
    driver.engine.residency.close()


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        ("ties", {}, "density"),
        ("dare_ties", {"density": 0.0}, "density"),
        ("magnitude_prune", {"density": float("nan")}, "density"),
        ("svd", {"density": 0.5}, "no density"),
        ("cat", {"rank": 4}, "rank"),
        ("svd", {"rank": 0}, "rank"),
    ],
)
def test_settings_that_a_method_does_not_take(method: Method, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FolderError, match=says):
        Recipe(method, **settings)


def test_parts_that_do_not_go_together(folder: Path) -> None:
    with pytest.raises(FolderError, match="different base models"):
        combine(parts(folder, "a", "other base"), WEIGHTS, Recipe("cat"))
    with pytest.raises(FolderError, match="same r value"):  # in PEFT's words: they share no module
        combine(parts(folder, "only q", "small"), WEIGHTS, Recipe("linear"))
    with pytest.raises(FolderError, match="two parts"):
        combine(parts(folder, "a"), [1.0], Recipe("svd"))
    for name, says in (("dora", "dora"), ("bias", "lora_bias"), ("model", "adapter_config.json")):
        with pytest.raises(FolderError, match=f"{name}.*{says}"):
            plain_lora.read(folder / name)


def test_names_are_never_peft_s_to_read(folder: Path, tmp_path: Path) -> None:
    """A module's name may look like a regular expression or an attribute."""
    shutil.copytree(folder / "a", tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_model.safetensors"
    tensors = load_file(file)
    config = (
        (tmp_path / "odd" / "adapter_config.json").read_text().replace("q_proj", "(a+)+$").replace("v_proj", "forward")
    )
    (tmp_path / "odd" / "adapter_config.json").write_text(config)
    save_file({n.replace("q_proj", "(a+)+$").replace("v_proj", "forward"): t for n, t in tensors.items()}, file)
    made = combine(parts(tmp_path, "odd", "odd"), [1.0, 1.0], Recipe("cat"))[1]
    assert made["base_model.model.model.layers.0.self_attn.(a+)+$.lora_A.weight"].shape == (16, 64)
