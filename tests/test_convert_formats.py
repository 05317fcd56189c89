"""`loraplex convert` of what is no plain PEFT folder: the result computes what the source means, or it is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from server.cli.main import app
from tests.fixtures.adapter_factory import tiny_llama, with_peft, write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(3, 30).unsqueeze(0)
runner = CliRunner()


def convert(*words: object) -> None:
    result = runner.invoke(app, ["convert", *map(str, words)])
    assert result.exit_code == 0, result.output


def refused(into: Path, *words: object) -> str:
    before = sorted(into.iterdir())
    result = runner.invoke(app, ["convert", *map(str, words)])
    *progress, error = result.stderr.splitlines()
    assert result.exit_code == 2 and error.startswith("error:"), result.output
    assert all("Loading weights" in line for line in progress if line), progress
    assert sorted(into.iterdir()) == before
    return error


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def load(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base)


def train(base: Path, folder: Path, **settings: Any) -> Tensor:
    """Write a trained adapter and return the logits of the trained model."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return logits(model)


PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}}


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"init_lora_weights": "olora", **PATTERNS},
    ],
)
def test_a_deterministic_start_is_computed_from_the_base(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    trained = train(base, tmp_path / "trained", **settings)
    (tmp_path / "trained" / "chat_template.jinja").write_text("x")
    convert(tmp_path / "trained", tmp_path / "plain", "--base", base)
    by_peft = logits(PeftModel.from_pretrained(load(base), tmp_path / "trained"))
    plain = logits(PeftModel.from_pretrained(load(base), tmp_path / "plain"))
    torch.testing.assert_close(by_peft, trained, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain, by_peft, atol=1e-4, rtol=1e-4)
    assert (plain - logits(load(base))).abs().max() > 0.05
    assert json.loads((tmp_path / "plain" / CONFIG).read_text())["r"] == 8
    assert (tmp_path / "plain" / "chat_template.jinja").read_text() == "x"


def test_pissa_on_layers_of_transposed_weights(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    trained = train(
        base, tmp_path / "trained", init_lora_weights="pissa", target_modules=["c_attn"], fan_in_fan_out=True
    )
    convert(tmp_path / "trained", tmp_path / "plain", "--base", base)
    torch.testing.assert_close(logits(with_peft(load(base), tmp_path / "plain")), trained, atol=1e-4, rtol=1e-4)


def test_starts_that_the_base_does_not_determine_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    train(base, tmp_path / "trained", init_lora_weights="pissa")
    place, made = tmp_path / "trained", tmp_path / "made"
    assert "--base" in refused(tmp_path, place, made)
    assert "--base" in refused(tmp_path, place, made, "--base", tmp_path / "nowhere")
    config = json.loads((place / CONFIG).read_text())
    for init, says in (("pissa_niter_4", "random numbers"), ("corda", "corda"), ("lora_ga", "lora_ga")):
        (place / CONFIG).write_text(json.dumps(config | {"init_lora_weights": init}))
        answer = refused(tmp_path, place, made, "--base", base)
        assert says in answer and init in answer and "--initial" in answer
    other = gpt2(tmp_path / "other")
    (place / CONFIG).write_text(json.dumps(config))
    assert "no module" in refused(tmp_path, place, made, "--base", other)


def as_pickle(folder: Path, wrap: str = "") -> Path:
    tensors = load_file(folder / WEIGHTS)
    torch.save({wrap: tensors} if wrap else tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@pytest.mark.parametrize("wrap", ["", "state_dict"])
def test_a_pickle_becomes_safetensors(wrap: str, tmp_path: Path) -> None:
    source = write_adapter(tiny_llama(), tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{}")
    tensors, config = load_file(source / WEIGHTS), (source / CONFIG).read_text()
    as_pickle(source, wrap)
    convert(source, tmp_path / "made")
    convert(source / "adapter_model.bin", tmp_path / "by file")
    for made in (tmp_path / "made", tmp_path / "by file"):
        found = load_file(made / WEIGHTS)
        assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert (made / CONFIG).read_text() == config and (made / "tokenizer_config.json").is_file()


def test_a_pickle_beside_a_residual_base_is_converted_at_once(base: Path, tmp_path: Path) -> None:
    trained = train(base, tmp_path / "trained", init_lora_weights="olora")
    convert(as_pickle(tmp_path / "trained"), tmp_path / "plain", "--base", base)
    torch.testing.assert_close(logits(with_peft(load(base), tmp_path / "plain")), trained, atol=1e-4, rtol=1e-4)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/loraplex-was-run",)


def test_a_pickle_runs_no_code_and_takes_no_more_memory_than_its_bound(tmp_path: Path) -> None:
    source = write_adapter(tiny_llama(), tmp_path / "source")
    (source / WEIGHTS).unlink()
    for content in ({"x": Evil()}, {"x": torch.zeros(1).expand(1 << 36)}, [torch.ones(1)], {"step": 3}):
        torch.save(content, source / "adapter_model.bin")
        assert "adapter_model.bin" in refused(tmp_path, source, tmp_path / "made")
    assert not Path("/tmp/loraplex-was-run").exists()
    (source / "adapter_model.bin").write_bytes(b"\x80\x02nonsense")
    assert "tensors alone" in refused(tmp_path, source, tmp_path / "made")


# -- MLX -----------------------------------------------------------------------------------------------------------

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def mlx_folder(folder: Path, kind: str = "lora", **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model, state = tiny_llama(), {}
    for module in (Q, V):
        outputs, inputs = model.get_submodule(module).weight.shape
        state[f"{module}.lora_a"], state[f"{module}.lora_b"] = torch.randn(inputs, 4) / 8, torch.randn(4, outputs) / 8
        if kind == "dora":
            state[f"{module}.m"] = model.get_submodule(module).weight.norm(dim=1) * 1.1
    folder.mkdir()
    save_file({name: t.detach().clone() for name, t in state.items()}, folder / "adapters.safetensors")
    settings = {"rank": 4, "scale": 20.0, "dropout": 0.0, **changes}
    (folder / CONFIG).write_text(json.dumps({"fine_tune_type": kind, "num_layers": 2, "lora_parameters": settings}))
    return state


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_mlx_is_converted(kind: str, tmp_path: Path) -> None:
    state = mlx_folder(tmp_path / "mlx", kind, scale=3.0)
    convert(tmp_path / "mlx", tmp_path / "made")
    expected = tiny_llama()
    for module in (Q, V):
        weight = expected.get_submodule(module).weight
        weight.data += 3.0 * (state[f"{module}.lora_a"] @ state[f"{module}.lora_b"]).T
        if kind == "dora":
            weight.data *= (state[f"{module}.m"] / weight.norm(dim=1))[:, None]
    ours = logits(with_peft(tiny_llama(), tmp_path / "made"))
    torch.testing.assert_close(ours, logits(expected), atol=1e-4, rtol=1e-4)
    assert (ours - logits(tiny_llama())).abs().max() > 0.05


def test_mlx_that_is_not_certain_is_refused(tmp_path: Path) -> None:
    state = mlx_folder(tmp_path / "mlx", alpha=16)
    assert "alpha" in refused(tmp_path, tmp_path / "mlx", tmp_path / "made")
    config = tmp_path / "mlx" / CONFIG
    config.write_text(json.dumps({"fine_tune_type": "full", "lora_parameters": {"scale": 1}}))
    assert "full" in refused(tmp_path, tmp_path / "mlx", tmp_path / "made")
    config.write_text(json.dumps({"lora_parameters": {"scale": 1}}))
    assert "--base" in refused(tmp_path, tmp_path / "mlx", tmp_path / "made", "--base", tmp_path)
    for name, tensor in {
        "model.embed_tokens.lora_a": torch.ones(3, 2),
        "x.switch_mlp.up_proj.lora_a": torch.ones(2, 4, 8),
        "x.q.bias": torch.ones(2),
    }.items():
        pair = {name.replace("lora_a", "lora_b"): tensor.mT.contiguous() if tensor.ndim > 1 else tensor}
        save_file(state | {name: tensor} | pair, tmp_path / "mlx" / "adapters.safetensors")
        assert name.rpartition(".")[0] in refused(tmp_path, tmp_path / "mlx", tmp_path / "made")


# -- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "o_proj": "attn_output", "down_proj": "ffn_down"}


def gguf_file(
    source: Path,
    file: Path,
    arch: str = "llama",
    alpha: float | None = 6.0,
    kind: str = "lora",
    dtype: Any = np.float32,
) -> Path:
    """As llama.cpp's convert_lora_to_gguf.py writes the adapter in `source`."""
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    config = tiny_llama().config
    for name, tensor in load_file(source / WEIGHTS).items():
        _, layer, _, module, factor, _ = name.removeprefix("base_model.model.model.").split(".")
        if arch == "llama" and module in ("q_proj", "k_proj") and factor == "lora_B":
            heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
            tensor = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{layer}.{GGUF_NAMES[module]}.weight.{factor.lower()}", tensor.numpy().astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def peft_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "adapter"
    return write_adapter(tiny_llama(), folder, r=4, lora_alpha=6, target_modules=[*GGUF_NAMES])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gguf_is_converted(dtype: Any, peft_source: Path, base: Path, tmp_path: Path) -> None:
    gguf_file(peft_source, tmp_path / "lora.gguf", dtype=dtype)
    convert(tmp_path / "lora.gguf", tmp_path / "made", "--base", base)
    found, expected = load_file(tmp_path / "made" / WEIGHTS), load_file(peft_source / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], torch.from_numpy(tensor.numpy().astype(dtype).astype(np.float32)))
    if dtype is np.float32:
        ours, theirs = (logits(with_peft(tiny_llama(), folder)) for folder in (tmp_path / "made", peft_source))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_gguf_without_alpha_has_the_factor_1_and_a_folder_names_its_file(
    peft_source: Path, base: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    gguf_file(peft_source, tmp_path / "folder" / "lora.gguf", alpha=None)
    convert(tmp_path / "folder", tmp_path / "made", "--base", base)
    config = json.loads((tmp_path / "made" / CONFIG).read_text())
    assert config["lora_alpha"] == config["r"] == 4


def test_gguf_that_cannot_be_converted_is_named(peft_source: Path, base: Path, tmp_path: Path) -> None:
    file, made = tmp_path / "lora.gguf", tmp_path / "made"
    assert "--base" in refused(tmp_path, gguf_file(peft_source, file), made)
    assert "gptneox" in refused(tmp_path, gguf_file(peft_source, file, "gptneox"), made, "--base", base)
    assert "adapter.type" in refused(tmp_path, gguf_file(peft_source, file, kind="other"), made, "--base", base)
    shutil.copyfile(gguf_file(peft_source, file), tmp_path / "whole.gguf")
    assert "base" in refused(tmp_path, file, made, "--base", gpt2(tmp_path / "gpt2"))
    file.write_bytes(file.read_bytes()[:200])
    assert "GGUF" in refused(tmp_path, file, made, "--base", base)
    assert "--alpha" in refused(tmp_path, tmp_path / "whole.gguf", made, "--base", base, "--alpha", 3)
