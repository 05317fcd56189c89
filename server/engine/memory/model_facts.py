"""The facts of a base model for the memory plan: of a loaded model, or of one built from its config without weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from adapters.model_spec import ModelSpec
from adapters.residency.slots import PAGE_COLUMNS
from adapters.runtime.pool import page_bytes
from server.engine.memory.memory_plan import REFERENCE_ROWS, ModelFacts
from server.model.kv_cache import CacheShape
from server.model.loading.loader import LoadedModel, ModelRefused, described
from server.model.loading.probe import probe

# Bytes per parameter of a doubly quantized NF4 weight: 4 bits, an 8-bit scale for 64 and a 32-bit scale for 16384.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


def facts_of(loaded: LoadedModel, shape: CacheShape, spec: ModelSpec, weights: int, nf4_weights: int = 0) -> ModelFacts:
    """Return the facts of `loaded`, whose weights take `weights` bytes."""
    itemsize = loaded.dtype.itemsize
    inner = [dims for name, dims in loaded.linears.items() if name != loaded.head]
    hidden = spec.modules[loaded.head][0] if loaded.head in spec.modules else max(min(dims) for dims in inner)
    widest = max((max(dims) for dims in inner), default=hidden)
    scratch = max((a * b for a, b in inner), default=0) * itemsize
    return ModelFacts(
        weights=weights,
        page=page_bytes(spec, loaded.dtype),
        kv_token=shape.bytes_per_token(),
        whole=_whole_bytes(spec, itemsize),
        vectors=2 * 4 * sum(outputs for _, outputs in spec.modules.values()),
        token=_token_bytes(loaded.config, hidden, widest, itemsize),
        scratch=scratch if loaded.nf4.startswith("nf4") else 0,
        reference=REFERENCE_ROWS * max(hidden, *(inputs for inputs, _ in inner)) * 4,
        largest_module=_largest_module(spec) * itemsize,
        vocab=spec.vocab_size or loaded.config.vocab_size,
        itemsize=itemsize,
        layers=len(shape.layers),
        max_model_len=loaded.max_model_len,
        experts=_expert_elements(spec) * itemsize,
        nf4_weights=nf4_weights,
        nf4_scratch=scratch,
    )


def _token_bytes(config: Any, hidden: int, widest: int, itemsize: int) -> int:
    """Return the activations of one token: residual, norms and attention, and an MLP's gate, up and product for every
    expert that computes it."""
    experts = next((n for key in _EXPERTS if (n := getattr(config, key, None))), 0)
    inner = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or widest
    routed = experts * (4 * inner + 2 * hidden) if experts else 0
    return itemsize * (8 * hidden + 4 * widest + routed) + 2 * 4 * hidden


_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def _whole_bytes(spec: ModelSpec, itemsize: int) -> int:
    names = [name for name in (spec.embedding, spec.head) if name]
    return sum(_elements(spec.parameters.get(name, {})) for name in names) * itemsize


def _expert_elements(spec: ModelSpec) -> int:
    """Return the elements of the factors of all gathered experts for rank 16 in each of their linears: two lie side by
    side in `gate_up_proj`, whose rank is twice as large."""
    shapes = [(name, s) for module in spec.gathered for name, s in spec.parameters[module].items() if len(s) == 3]
    return sum(PAGE_COLUMNS * (1 + (name == "gate_up_proj")) * s[0] * (s[1] + s[2]) for name, s in shapes)


def _largest_module(spec: ModelSpec) -> int:
    """Return the parameters of the largest module that is no linear or embedding: the experts of a layer."""
    rest = spec.parameters.keys() - spec.modules.keys() - {spec.embedding, spec.head}
    return max((_elements(spec.parameters[name]) for name in rest), default=0)


def _elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the size of the storages of `tensors`, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def loaded_weights(model: nn.Module) -> int:
    """Return the bytes of a loaded model, with the scales of 4-bit weights."""
    tensors = [*model.parameters(), *model.buffers()]
    states = [state for t in tensors if (state := getattr(t, "quant_state", None)) is not None]
    for state in [*states, *(inner for state in states if (inner := getattr(state, "state2", None)) is not None)]:
        tensors += [state.absmax, state.code]
    return tensor_bytes(tensors)


# -- without weights -----------------------------------------------------------------------------------------------


def facts_from_config(path: str, dtype: str, quantization: str, max_model_len: int, max_rank: int) -> ModelFacts:
    """Return the facts of the model at `path` (a folder, a config.json or a hub id) from its config alone: the model is
    built on torch's meta device and probed like a loaded one. Raises `ModelRefused`."""
    if Path(path).suffix == ".gguf":
        raise ModelRefused("a .gguf file cannot be planned without loading it")
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        kind = _dtype(config, dtype)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=kind)
    except (OSError, ValueError, KeyError) as error:
        raise ModelRefused(f"the config of '{path}' cannot be used: {error}") from error
    loaded = described(model, torch.device("meta"), max_model_len, nf4="nf4: planned" if quantization == "nf4" else "")
    shape, spec = probe(loaded, max_rank)
    plain = sum(p.numel() for p in model.parameters()) * kind.itemsize
    quantized = _nf4_bytes(plain, loaded)
    return facts_of(loaded, shape, spec, quantized if quantization == "nf4" else plain, quantized)


def _dtype(config: Any, dtype: str) -> torch.dtype:
    if dtype != "auto":
        found: torch.dtype = getattr(torch, dtype)
        return found
    return getattr(config.get_text_config(), "dtype", None) or torch.float32


def _nf4_bytes(plain: int, loaded: LoadedModel) -> int:
    """Return the bytes of the model with all linears but the head in NF4."""
    inner = sum(a * b for name, (a, b) in loaded.linears.items() if name != loaded.head)
    return plain - inner * loaded.dtype.itemsize + int(inner * NF4_BYTES)
