"""`loraplex plan`: the memory plan of a GPU that need not be there, from the model's config alone."""

import json
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.config import GIB, ServeConfig
from server.engine.memory.memory_plan import (
    DEFAULT_RANK,
    DRIVER_BYTES,
    DeviceMemory,
    MemoryPlan,
    PlanRefused,
    make_plan,
    with_adapters,
)

_SERVE_FLAGS = (
    "quantization",
    "dtype",
    "adapter_slots",
    "max_adapter_rank",
    "adapter_device_bytes",
    "max_num_seqs",
    "max_batch_tokens",
    "max_model_len",
    "kv_cache_bytes",
)
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def plan(
    model: Annotated[str, typer.Option(help="Folder, config.json or hub id of the base model; no weights are read")],
    gpu: Annotated[str, typer.Option(help="Memory of the GPU, such as 24GiB")],
    adapters: Annotated[int, typer.Option(help="Adapters of --rank that stay on the device; 0 plans the default")] = 0,
    rank: Annotated[int, typer.Option(help="Largest LoRA rank")] = 64,
    quantization: Annotated[str, typer.Option(help="none or nf4 (planned for --nf4-policy nf4)")] = "none",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    max_num_seqs: Annotated[int, typer.Option(help="Maximum number of sequences in one step")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in one step")] = 512,
    max_model_len: Annotated[int, typer.Option(help="Maximum length of a sequence; 0 uses what fits")] = 0,
    kv_cache_bytes: Annotated[int, typer.Option(help="Memory of the KV cache; 0 gives it the rest")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="Plan without CUDA graphs")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")] = False,
) -> None:
    """Show how a GPU's memory would be divided, or which flag to change if the model does not fit."""
    settings: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "quantization": quantization,
        "max_adapter_rank": rank,
        "max_num_seqs": max_num_seqs,
        "max_batch_tokens": max_batch_tokens,
        "max_model_len": max_model_len,
        "kv_cache_bytes": kv_cache_bytes,
        "eager": eager,
    }
    try:
        config, found = plan_offline(ServeConfig(**settings), size_in_bytes(gpu), adapters)
    except (PlanRefused, ValueError) as refused:
        typer.echo(json.dumps({"error": str(refused)}) if as_json else f"error: {refused}", err=not as_json)
        raise typer.Exit(2) from refused
    flags = _flags(config)
    if as_json:
        typer.echo(json.dumps(_as_json(found, flags), indent=2))
    else:
        _print(found, flags)


def plan_offline(config: ServeConfig, gpu_bytes: int, adapters: int = 0) -> tuple[ServeConfig, MemoryPlan]:
    """Return the plan of a GPU of `gpu_bytes`, and `config` with room for `adapters` adapters of the largest rank if
    that is not 0. Raises `PlanRefused`, or `ValueError` if the config of the model cannot be used."""
    from server.engine.memory.model_facts import facts_from_config  # imports torch
    from server.model.graphs import bucket_sizes
    from server.model.loading.loader import ModelRefused

    try:
        facts = facts_from_config(
            config.model,
            config.dtype,
            config.quantization,
            config.max_model_len,
            config.max_adapter_rank or DEFAULT_RANK,
        )
    except ModelRefused as refused:
        raise ValueError(str(refused)) from refused
    if adapters:
        config = with_adapters(facts, config, adapters)
    rows = () if config.eager else bucket_sizes(config.max_num_seqs)
    return config, make_plan(facts, config, DeviceMemory(gpu_bytes, taken=DRIVER_BYTES), rows)


def size_in_bytes(text: str) -> int:
    """Parse a size such as "24GiB". Raises `ValueError`."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if not found or unit is None:
        raise ValueError(f"--gpu {text}: write a size such as 24GiB")
    return int(float(found[1]) * unit)


def _flags(config: ServeConfig) -> str:
    """Return the flags of `loraplex serve` that differ from the defaults."""
    default = ServeConfig()
    changed = [name for name in _SERVE_FLAGS if getattr(config, name) != getattr(default, name)]
    given = [f"--{name.replace('_', '-')} {getattr(config, name)}" for name in changed]
    return " ".join([f"--model {config.model}", *given, *(["--eager"] if config.eager else [])])


def _as_json(found: MemoryPlan, flags: str) -> dict[str, Any]:
    return {
        "total": found.total,
        "parts": found.parts,
        "unused": found.unused,
        "adapter_pages": found.num_pages,
        "kv_blocks": found.num_blocks,
        "override_bytes": found.override_bytes,
        "max_model_len": found.max_model_len,
        "workspace": found.workspace,
        "serve": flags,
    }


def _print(found: MemoryPlan, flags: str) -> None:
    table = Table("part", "GiB", title=f"memory plan (workspace {found.workspace})", title_justify="left")
    for name, size in found.rows():
        table.add_row(name, f"{size / GIB:.2f}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"longest sequence: {found.max_model_len} tokens; adapter pages of 16 columns: {found.num_pages}")
    console.print(f"loraplex serve {flags}")
