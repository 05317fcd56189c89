"""Conversion of adapters trained on a residual base to plain LoRA, compared with PEFT's own conversion."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from adapters.convert import peft_folder as plain_lora
from adapters.convert.folders import FolderError
from adapters.convert.residual_base import convert
from adapters.load import load
from tests.fixtures.adapter_factory import spec_of, tiny_llama, with_peft, write_adapter

TOKENS = torch.arange(3, 30).unsqueeze(0)
PATTERNS: dict[str, Any] = {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}}
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iteration": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {"init_lora_weights": "olora", **PATTERNS},
    "rslora, patterns": {"init_lora_weights": "pissa", "use_rslora": True, **PATTERNS},
}


def train(folder: Path, **config: Any) -> Tensor:
    """Write `start`, `trained` and, where PEFT can convert, `by peft` to `folder`; return the trained logits."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern")
        model = get_peft_model(tiny_llama(), LoraConfig(**settings))
    model.save_pretrained(folder / "start")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder / "trained")
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=TOKENS).logits
    if not (config.get("use_rslora") and config.get("rank_pattern")):
        initial = changed(folder / "start", folder / "initial", init_lora_weights=True)
        model.peft_config["default"].init_lora_weights = True  # both as PEFT's guide asks for
        model.save_pretrained(folder / "by peft", path_initial_model_for_weight_conversion=str(initial))
    return logits


def changed(folder: Path, into: Path, **changes: Any) -> Path:
    shutil.copytree(folder, into)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (into / "adapter_config.json").write_text(json.dumps(config))
    return into


@pytest.mark.parametrize("case", CASES)
def test_the_converted_adapter_has_the_same_effect_on_the_unmodified_base(case: str, tmp_path: Path) -> None:
    logits = train(tmp_path, **CASES[case])
    (tmp_path / "plain").mkdir()
    plain_lora.save(tmp_path / "plain", *convert(tmp_path / "trained", tmp_path / "start"))
    with torch.no_grad():
        answer = with_peft(tiny_llama(), tmp_path / "plain")(input_ids=TOKENS).logits
        untouched = tiny_llama()(input_ids=TOKENS).logits
    torch.testing.assert_close(answer, logits, atol=1e-4, rtol=1e-4)
    assert (logits - untouched).abs().max() > 0.05
    weights = load(tmp_path / "plain", spec_of(tiny_llama()))
    if case != "rslora, patterns":  # which PEFT refuses to convert
        expected = load(tmp_path / "by peft", spec_of(tiny_llama()))
        assert {m: f.scaling for m, f in weights.factors.items()} == {m: f.scaling for m, f in expected.factors.items()}
        ours, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "by peft"))
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6, msg=name)


def test_a_config_with_init_lora_weights_true_is_converted_as_in_peft_s_guide(tmp_path: Path) -> None:
    train(tmp_path, init_lora_weights="pissa")
    trained = changed(tmp_path / "trained", tmp_path / "true", init_lora_weights=True)
    for ours, theirs in zip(
        convert(trained, tmp_path / "initial"), convert(tmp_path / "trained", tmp_path / "start"), strict=True
    ):
        assert str(ours) == str(theirs)


def test_adapters_that_cannot_be_converted(tmp_path: Path) -> None:
    plain = write_adapter(tiny_llama(), tmp_path / "plain")
    wider = write_adapter(tiny_llama(), tmp_path / "wider", r=9)
    other = write_adapter(tiny_llama(), tmp_path / "other", target_modules=["q_proj"])
    dora = write_adapter(tiny_llama(), tmp_path / "dora", use_dora=True)
    cases: list[tuple[Path, Path, str]] = [
        (plain, wider, "not what .* began with"),
        (plain, other, "not what .* began with"),
        (plain, changed(plain, tmp_path / "alpha", lora_alpha=3), "not what .* began with"),
        (changed(plain, tmp_path / "loftq", init_lora_weights="loftq"), plain, "loftq"),
        (changed(plain, tmp_path / "gauss", init_lora_weights="gaussian"), plain, "gaussian"),
        (dora, dora, "dora"),
        (changed(plain, tmp_path / "unknown", use_bdlora=True), plain, "unknown: .*use_bdlora"),
        (plain, tmp_path / "nowhere", "nowhere"),
    ]
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "adapter_config.json").write_text("[]")
    cases.append((tmp_path / "list", plain, "no JSON object"))
    shutil.copytree(plain, tmp_path / "half")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    cases.append((tmp_path / "half", plain, "half has no adapter_model.safetensors"))
    for trained, initial, says in cases:
        with pytest.raises((FolderError, FileNotFoundError), match=says):
            convert(trained, initial)
