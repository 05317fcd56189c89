"""The wheel, installed outside the repository and run on a machine without a compiler."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adapters.device import cpp_build, forms
from server import __version__
from tests.fixtures.timing import HANG_SECONDS
from tests.fixtures.tiny_server import BASE, running_server, write_tiny_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SOURCES = ("adapters/kernels/lora_cpu.cpp", "server/model/cpu/ops.cpp")
TREE = ("server", "adapters", "examples", "tests/__init__.py", "deploy")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_the_tree(folder: Path) -> Path:
    """Copy what is built, because a build writes beside its sources."""
    for name in (*FILES, *TREE):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, so that the sdist is complete as well."""
    if forms.compiler() is None:
        pytest.skip("no C++ compiler was found, and the wheel is built with one")
    tree, out = copy_of_the_tree(tmp_path_factory.mktemp("tree")), tmp_path_factory.mktemp("dist")
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=tree)
    (sdist,) = out.glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir")
    run(sys.executable, "-m", "pip", "wheel", *options, out, sdist, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-index", "--disable-pip-version-check", "--target")
    run(sys.executable, "-m", "pip", "install", *options, folder, wheel, cwd=folder)
    return folder


@pytest.fixture
def bare(site: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a user with the wheel, without a compiler and with an empty cache."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", forms.FORCED)}
    own = {"PATH": str(site / "bin"), "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    return {**kept, **own}


def test_the_wheel_has_all_forms_of_this_architecture_and_no_tests(wheel: Path) -> None:
    assert wheel.name.startswith(f"loraplex-{__version__}-py3-none-linux_")
    names = set(zipfile.ZipFile(wheel).namelist())
    built = [form for form in forms.FORMS if forms.why_not_built(form) is None]
    assert {"avx512", "avx2", "plain"} <= {form.name for form in built} or forms.platform.machine() != "x86_64"
    libraries = {
        f"adapters/device/prebuilt/{cpp_build.prebuilt_name(ROOT / source, form)}"
        for source in SOURCES
        for form in built
    }
    assert {name for name in names if name.endswith(".so")} == libraries
    for name in ("server/demo_adapters/sql/adapter_model.safetensors", "server/console/static/index.html", *SOURCES):
        assert name in names
    assert {name.split("/")[0] for name in names} == {"server", "adapters", f"loraplex-{__version__}.dist-info"}


def test_the_command_is_that_of_the_wheel(site: Path, bare: dict[str, str], tmp_path: Path) -> None:
    assert run(site / "bin" / "loraplex", "--version", cwd=tmp_path, environment=bare) == f"loraplex {__version__}\n"
    where = "import server, server.start_checks as s; print(server.__file__, s.DEMO_ADAPTERS)"
    package, demo = run(sys.executable, "-c", where, cwd=tmp_path, environment=bare).split()
    assert Path(package).is_relative_to(site) and Path(demo).is_relative_to(site)


def test_the_native_code_is_prebuilt_where_there_is_no_compiler(
    site: Path, bare: dict[str, str], tmp_path: Path
) -> None:
    found = json.loads(run(site / "bin" / "loraplex", "doctor", "--json", cwd=tmp_path, environment=bare))
    code = found["native code"]
    expected = next(form.name for form in forms.FORMS if forms.why_not_run(form) is None)
    assert code["compiler"] == "none found"
    assert code["used"].split()[0] == expected and code[expected] == "prebuilt"


def test_a_server_of_the_wheel_serves_with_native_code_and_compiles_nothing(
    bare: dict[str, str], tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model", hidden_size=64)
    flags = ("--model", str(model), "--served-model-name", BASE, "--dtype", "float32")
    elsewhere = (shutil.which("env") or "env", "-C", str(tmp_path))
    with (
        running_server(tmp_path / "data", *flags, environment=bare, within=elsewhere) as server,
        server.client() as client,
    ):
        assert server.complete(client, BASE, "Hello")["choices"][0]["text"]
        engine = client.get("/version").json()["engine"]
        assert not engine["native_code"].startswith(forms.NONE) and engine["lora_kernel"] == "native C++ kernel"
    assert not (tmp_path / "cache" / "loraplex" / "kernels").exists()
