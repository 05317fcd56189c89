"""The architecture's arrows: server.api → server.engine → server.model → adapters."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("server/**/*.py"), *ROOT.glob("adapters/**/*.py")])

# Folder (or module) → what it must not import.
FORBIDDEN = {
    "adapters": ["server", "fastapi", "prometheus_client"],
    "server/model": ["server.engine", "server.api", "server.serve"],
    "server/engine": ["server.api", "server.serve"],
    "server/sequence.py": ["torch", "server"],
    "server/engine/scheduler.py": ["torch", "transformers", "server.model"],
    "server/engine/policies.py": ["torch", "transformers", "server.model"],
    "server/engine/block_manager.py": ["torch", "transformers", "server.model"],
    "server/engine/merging.py": ["torch", "transformers", "server.model"],
    "server/ipc/messages.py": ["torch", "transformers", "server.model"],
    "server/engine/machine.py": ["torch", "transformers", "server.model"],
    "server/writable.py": ["torch", "transformers", "huggingface_hub"],
    "adapters/device/forms.py": ["torch"],
    "adapters/residency/slots.py": ["torch"],
    "adapters/kernels/segments.py": ["torch"],
    "adapters/residency/host_cache.py": ["torch"],
    "adapters/residency/residency.py": ["torch"],
    "adapters/registry/registry.py": ["torch"],
    "adapters/registry/db.py": ["torch"],
    "adapters/registry/records.py": ["torch"],
    "adapters/registry/index.py": ["torch"],
    "adapters/registry/gc.py": ["torch"],
    "adapters/registry/aliases.py": ["torch"],
    "adapters/registry/store.py": ["torch"],
    "adapters/peft/config_reader.py": ["torch"],
    "adapters/peft/lora_config.py": ["torch"],
}
# Package → the only places that may import it.
ONLY_IN = {
    "prometheus_client": ["server/metrics.py"],
    "fastapi": ["server/api"],
    "uvicorn": ["server/serve.py"],
    "zmq": ["server/ipc/process_transport.py"],
    "peft": ["adapters/convert/add_weighted.py"],
    "obstore": ["adapters/sources/s3.py"],
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_one_way(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    for module in imports(path):
        for place, forbidden in FORBIDDEN.items():
            if where == place or where.startswith(place + "/"):
                assert not any(within(module, package) for package in forbidden), f"{where} imports {module}"
        for package, allowed in ONLY_IN.items():
            if within(module, package):
                assert any(where == place or where.startswith(place + "/") for place in allowed), where


def test_nothing_on_the_serving_path_can_run_foreign_code() -> None:
    """No pickle, no eval, no remote code: adapters and messages are data."""
    banned_modules = {"pickle", "marshal", "dill", "shelve"}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert not {module.split(".")[0] for module in imports(path)} & banned_modules, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "yaml.load", "os.system"}, f"{path}: {called}"
                if called == "torch.load":  # tensors and nothing else, in a tool that is no part of the server
                    assert path.name == "loralib.py" and "weights_only=True" in ast.unparse(node), path
                for keyword in node.keywords:
                    pair = (keyword.arg, ast.unparse(keyword.value))
                    assert pair not in {("shell", "True"), ("trust_remote_code", "True")}, path


def test_the_adapters_distribution_of_somebody_else_is_not_installed() -> None:
    """`adapters` is also a name on PyPI; were it installed, one of the two packages would hide the other."""
    from importlib.metadata import packages_distributions

    assert set(packages_distributions()["adapters"]) == {"loraplex"}
