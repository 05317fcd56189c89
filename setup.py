"""Completes the wheel: the native code compiled for every form of the build machine's architecture, so that no compiler
is needed where the wheel is installed, and the demo adapters. All settings are in pyproject.toml.

An editable install gets neither: it compiles on first use, and has the demo adapters in examples/.
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from adapters.device import cpp_build, forms  # noqa: E402  (the build backend does not look beside setup.py)

SOURCES = (ROOT / "adapters" / "kernels" / "lora_cpu.cpp", ROOT / "server" / "model" / "cpu" / "ops.cpp")
DEMO_ADAPTERS = ROOT / "examples" / "adapters"


class CompletePackages(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib)
            shutil.copytree(DEMO_ADAPTERS, target / "server" / "demo_adapters", dirs_exist_ok=True)
            compile_all(target / "adapters" / "device" / "prebuilt")


class WithLibraries(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class WheelOfPlatform(bdist_wheel):
    """The libraries are for one platform, and for any Python: they are called through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compile_all(folder: Path) -> None:
    for form in forms.FORMS:
        if obstacle := forms.why_not_built(form):
            print(f"no native code for {form.name}: {obstacle}", file=sys.stderr)
    built = [form for form in forms.FORMS if forms.why_not_built(form) is None]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(add_library, folder, form, source) for form in built for source in SOURCES]
    for job in jobs:
        job.result()


def add_library(folder: Path, form: forms.Form, source: Path) -> None:
    library = folder / cpp_build.prebuilt_name(source, form)
    library.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(cpp_build.build(source, form), library)


setup(distclass=WithLibraries, cmdclass={"build_py": CompletePackages, "bdist_wheel": WheelOfPlatform})
