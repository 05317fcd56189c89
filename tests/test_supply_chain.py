"""What the images install: locked with hashes, the pinned versions, and nothing of development's."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-cpu.lock", "requirements-model.lock")
FROM_TORCHS_INDEX = re.compile(r"torch|triton|nvidia-.*|cuda-.*")
OF_TRITON = "triton"  # of the tests' CPU build in constraints.txt; torch's CUDA build brings its own


def locked(name: str) -> dict[str, str]:
    """Return the versions of a lock by their normalized names, after a look at their hashes."""
    found: dict[str, str] = {}
    for requirement in re.split(r"\n(?=\w)", (ROOT / name).read_text()):
        if requirement.startswith("#"):
            continue
        pin, *hashes = requirement.split("--hash=sha256:")
        assert hashes and all(re.match(r"[0-9a-f]{64}\b", digest) for digest in hashes), pin
        package, version = pin.split(";")[0].strip(" \\\n").split("==")
        found[_normal(package)] = version.split()[0]
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.match(r"[\w.-]+", one)[0]) for one in requirements}  # type: ignore[index]


@pytest.mark.reliability("T72")
@pytest.mark.parametrize("name", LOCKS)
def test_locked_versions_are_the_pinned_ones(name: str) -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {_normal(package): version for package, version in pinned.items()}
    found = locked(name)
    assert found
    for package, version in found.items():
        assert package == OF_TRITON or pins.get(package, version) == version, f"{package}: run 'make lock'"


@pytest.mark.reliability("T72")
def test_every_dependency_is_locked_and_none_of_development() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = _names([*project["dependencies"], *project["optional-dependencies"]["s3"]])
    development = _names(project["optional-dependencies"]["dev"]) - needed - {"loraplex", OF_TRITON, "psutil"}
    everything, without_torch = locked(LOCKS[0]), locked(LOCKS[1])
    assert needed <= everything.keys(), "run 'make lock'"
    assert not development & everything.keys()
    assert without_torch == {name: v for name, v in everything.items() if not FROM_TORCHS_INDEX.fullmatch(name)}


@pytest.mark.reliability("T72")
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_install_what_is_locked(target: str) -> None:
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S))
    commands = re.findall(r"pip install [^&]+", stages[target].replace("\\\n", ""))
    unlocked = [command for command in commands if "--require-hashes" not in command]
    assert len(commands) > len(unlocked) > 0
    for command in unlocked:
        assert "--no-deps" in command and (" ." in command or "torch==" in command), command
