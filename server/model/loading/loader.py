"""Loads the base model through unmodified transformers classes, and refuses models that cannot be served exactly."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from server.model.loading.checkpoint import load_causal_lm
from server.model.loading.gguf import load_gguf
from server.model.loading.nf4_cache import NF4Cache, source_key
from server.model.quantization.nf4 import Policy, apply_policy
from server.model.quantization.nf4_pieces import quantized_in_pieces

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# RoPE types whose frequencies depend on the longest sequence: in a batch, one request would change the others.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class ModelRefused(Exception):
    """The base model cannot be loaded or served exactly; the message has the reason and says what would work."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: nn.Module
    config: Any  # transformers' PreTrainedConfig of the text model
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    head: str  # name of the output head's module
    linears: dict[str, tuple[int, int]]  # (in_features, out_features) of every linear, by name
    eos_token_ids: frozenset[int]
    fingerprint: str  # 12 hex digits; of the quantized weights, even if the server computes with a copy
    nf4: str = ""  # description of how 4-bit linears are computed


def load_model(
    path: str, dtype: str, quantization: str, device: str, max_model_len: int, nf4_policy: Policy = "auto"
) -> LoadedModel:
    """Load the causal LM at `path` (folder, .gguf file or hub id) for inference.

    `max_model_len` 0 uses the model's own limit. Raises `ModelRefused`.
    """
    where = chosen_device(device)
    try:
        model = _from_pretrained(path, _requested_dtype(path, dtype, where), quantization, where)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"the model '{path}' cannot be loaded: {error}") from error
    loaded = described(model, where, max_model_len)
    fingerprint = _fingerprint(model, quantization)
    nf4 = apply_policy(model, nf4_policy, model.dtype, where) if quantization == "nf4" else ""
    return replace(loaded, fingerprint=fingerprint, nf4=nf4)


def described(model: Any, device: torch.device, max_model_len: int, nf4: str = "") -> LoadedModel:
    """Return the description of a causal LM, whose weights may be on torch's meta device; the fingerprint is empty.
    Raises `ModelRefused`."""
    model.eval().requires_grad_(False)
    config = model.config.get_text_config()
    refuse_unsupported(config)
    linears = _linears(model)
    head_module = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is head_module), None)
    if head is None:
        raise ModelRefused("the model has no output head, so it cannot generate text")
    return LoadedModel(
        model=model,
        config=config,
        dtype=model.dtype,
        device=device,
        max_model_len=_max_model_len(config, max_model_len),
        head=head,
        linears=linears,
        eos_token_ids=_eos_token_ids(model),
        fingerprint="",
        nf4=nf4,
    )


def described_without_weights(path: str) -> LoadedModel:
    """Return the description of the model at `path` (folder, config.json or hub id), built from its config on torch's
    meta device. Raises `ModelRefused`."""
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"the config of '{path}' cannot be used: {error}") from error
    return described(model, torch.device("meta"), 0)


def refuse_unsupported(config: Any) -> None:
    """Raise `ModelRefused` for architectures whose attention is not plain causal attention, full or sliding."""
    problems = []
    if getattr(config, "is_encoder_decoder", False):
        problems.append("it is an encoder-decoder model")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if layer_types - {"full_attention", "sliding_attention"}:
        problems.append(f"it has layers of type {', '.join(sorted(layer_types))}")
    if getattr(config, "attention_chunk_size", None):
        problems.append("it attends in chunks")
    if getattr(config, "use_bidirectional_attention", None):
        problems.append("its attention is bidirectional")
    if getattr(config, "reorder_and_upcast_attn", False):
        problems.append("it upcasts attention (reorder_and_upcast_attn)")
    if getattr(config, "num_kv_shared_layers", 0):
        problems.append("its layers share keys and values")
    if problems:
        raise ModelRefused(f"{config.model_type} cannot be served exactly: {'; '.join(problems)}")


def chosen_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # because Triton launches on the current device
    return chosen


def _requested_dtype(path: str, dtype: str, device: torch.device) -> torch.dtype:
    """Resolve `auto` to the checkpoint's dtype; on a CPU, float16 becomes float32, because CPUs lack float16 math."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if path.endswith(".gguf"):
        return torch.bfloat16
    config = transformers.AutoConfig.from_pretrained(path).get_text_config()
    declared = getattr(config, "dtype", None) or torch.float32
    return torch.float32 if declared is torch.float16 and device.type == "cpu" else declared


def _from_pretrained(path: str, dtype: torch.dtype, quantization: str, device: torch.device) -> Any:
    if path.endswith(".gguf"):
        if quantization != "none":
            raise ModelRefused("a GGUF file cannot be quantized again; convert it to safetensors first")
        return load_gguf(Path(path), dtype).to(device)
    if quantization == "nf4":
        return _quantized(path, dtype, device)
    return load_causal_lm(path, dtype=dtype, use_safetensors=True).to(device)


def _quantized(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the model in NF4: as it was quantized by an earlier start, or quantized now and kept for the next one."""
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "device_map": {"": device}}
    cache = NF4Cache()
    key = source_key(_folder(path), dtype, device)
    kept = cache.load(key, lambda folder: load_causal_lm(folder, **options)) if key else None
    if kept is not None:
        return kept
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    with quantized_in_pieces():
        model = load_causal_lm(path, quantization_config=config, **options)
    key = key or source_key(_folder(path), dtype, device)  # its files may have been downloaded meanwhile
    if key:
        cache.store(key, model)
    return model


def _folder(path: str) -> Path:
    """Return the folder of a model that may be named by its hub id."""
    return Path(str(cached_file(path, "config.json"))).parent


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):  # bitsandbytes' Linear4bit is one
            found[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[name] = (module.nx, module.nf)
    return found


def _max_model_len(config: Any, requested: int) -> int:
    limit = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    if any(kind.get("rope_type") in _LENGTH_DEPENDENT_ROPE for kind in kinds):
        original = [kind.get("original_max_position_embeddings") for kind in kinds]
        limit = min([limit, *(int(value) for value in original if value)])
    if requested > limit:
        raise ModelRefused(f"--max-model-len {requested} exceeds this model's limit of {limit} tokens")
    return requested or limit


def _eos_token_ids(model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(ids)


def _fingerprint(model: Any, quantization: str) -> str:
    """Return a fingerprint of the model: its config, precision, and a sample of every weight's bytes."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps([config, quantization], sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        head = parameter.detach().flatten()[:1024].contiguous().view(torch.uint8).cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode() + head)
    return digest.hexdigest()[:12]
