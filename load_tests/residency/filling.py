"""Data folders full of adapters, made without a server: uploading thousands would take longer than what is measured."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from adapters.peft.digest import digest_of
from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.registry.db import connect, point, transaction
from adapters.registry.registry import AdapterRegistry, AdapterVersion
from adapters.registry.store import AdapterStore
from load_tests.engine_bench import write_adapter
from server.model.loading.default_model import prepare_default_model


def template(folder: Path, rank: int) -> Path:
    """A random adapter on all linears of SmolLM2, written by PEFT (in float32, as it does)."""
    base = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
    return write_adapter(base, folder / "template", rank, seed=0)


def variants(source: Path, folder: Path, count: int) -> dict[str, Path]:
    """PEFT folders by digest: as many versions of `source`, which differ in `lora_alpha` alone.

    Their tensors are hard links to one file, so reading one costs all but the disk: the page cache has it.
    """
    config = json.loads((source / CONFIG_FILE).read_text())

    def write(index: int) -> tuple[str, Path]:
        own = folder / f"{index:05d}"
        own.mkdir(parents=True)
        alpha = config["lora_alpha"] * (1 + index / 4096)
        (own / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": alpha}))
        os.link(source / WEIGHTS_FILE, own / WEIGHTS_FILE)
        return digest_of(own), own

    with ThreadPoolExecutor(2) as threads:
        return dict(threads.map(write, range(count)))


def fill(data_dir: Path, versions: dict[str, Path]) -> list[str]:
    """Publish each version under a name of its own, through the registry's tables; returns the names, in order."""
    AdapterRegistry(data_dir).close()
    store = AdapterStore(data_dir / "store")
    names = [f"adapter-{index:05d}" for index in range(len(versions))]
    db = connect(data_dir, store)
    with transaction(db):
        for name, (digest, folder) in zip(names, versions.items(), strict=True):
            place = store.path(digest)
            place.mkdir(parents=True)
            for file in (CONFIG_FILE, WEIGHTS_FILE):
                os.link(folder / file, place / file)
            point(db, name, _version(digest, folder), "upload", False, 5)
    db.close()
    return names


def _version(digest: str, folder: Path) -> AdapterVersion:
    config = json.loads((folder / CONFIG_FILE).read_text())
    targets, nbytes = tuple(sorted(config["target_modules"])), (folder / WEIGHTS_FILE).stat().st_size
    return AdapterVersion(digest, config["r"], targets, nbytes, int(time.time()), json.dumps({"features": []}))
