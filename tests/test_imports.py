"""The house's law: which rooms may import which, what stays free of torch, and what only one place may import.

A room is a folder, or a module that stands apart from its folder. The arrows below are all that there are, lazy imports
included, and they make no circle.
"""

import ast
import graphlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("server/**/*.py"), *ROOT.glob("adapters/**/*.py")])

# Room → the rooms that it imports. `adapters` and `server` by themselves are the modules directly in those folders.
ARROWS: dict[str, set[str]] = {
    "adapters": set(),
    "adapters.weights": set(),
    "adapters.load": {
        "adapters",
        "adapters.peft",
        "adapters.validation",
        "adapters.validation.peft_types",
        "adapters.weights",
    },
    "adapters.device": set(),
    "adapters.peft": {"adapters"},
    "adapters.validation": {"adapters", "adapters.peft", "adapters.validation.peft_types"},
    "adapters.validation.peft_types": {"adapters", "adapters.peft"},
    "adapters.registry": {"adapters", "adapters.peft"},
    "adapters.sources": {"adapters", "adapters.peft"},
    "adapters.residency": {"adapters"},
    "adapters.kernels": {"adapters", "adapters.device"},
    "adapters.runtime": {"adapters", "adapters.device", "adapters.kernels", "adapters.residency", "adapters.weights"},
    "adapters.convert": {"adapters", "adapters.load", "adapters.peft", "adapters.weights"},
    "server": set(),
    "server.http": {"server.api.errors"},
    "server.metrics": {"server", "server.ipc"},
    "server.history": {"server.ipc", "server.metrics"},
    "server.console": set(),
    "server.start_checks": {
        "adapters",
        "adapters.peft",
        "adapters.registry",
        "adapters.sources",
        "adapters.validation",
        "server",
    },
    "server.data_folder": {"adapters.registry", "server"},
    "server.launch": {
        "adapters",
        "server",
        "server.data_folder",
        "server.ipc",
        "server.model.loading",
        "server.serve",
        "server.start_checks",
    },
    "server.serve": {
        "adapters",
        "adapters.registry",
        "adapters.sources",
        "adapters.validation",
        "server",
        "server.api.adapters",
        "server.api.app",
        "server.api.context",
        "server.api.errors",
        "server.api.middleware",
        "server.api.text",
        "server.engine",
        "server.http",
        "server.ipc",
        "server.metrics",
        "server.start_checks",
    },
    "server.__main__": {"server.cli"},
    "server.ipc": {"adapters", "server"},
    "server.engine": {
        "adapters",
        "adapters.device",
        "adapters.kernels",
        "adapters.load",
        "adapters.peft",
        "adapters.registry",
        "adapters.residency",
        "adapters.runtime",
        "adapters.validation",
        "adapters.weights",
        "server",
        "server.ipc",
        "server.model.attention",
        "server.model.batch",
        "server.model.cpu",
        "server.model.graphs",
        "server.model.kv_cache",
        "server.model.loading",
        "server.model.packed_linear",
        "server.model.pooling",
        "server.model.runner",
        "server.model.sampling",
        "server.model.selftest",
        "server.model.warm_up",
    },
    "server.model": set(),
    "server.model.loading": {
        "adapters",
        "adapters.runtime",
        "server",
        "server.model.attention",
        "server.model.batch",
        "server.model.fusion",
        "server.model.kv_cache",
        "server.model.quantization",
    },
    "server.model.quantization": {"adapters.runtime"},
    "server.model.sampling": {"adapters.device", "server", "server.model.cpu"},
    "server.model.attention": {"adapters.device", "server.model.batch", "server.model.cpu", "server.model.kv_cache"},
    "server.model.cpu": {
        "adapters.device",
        "adapters.kernels",
        "adapters.runtime",
        "server.model.batch",
        "server.model.kv_cache",
        "server.model.llama_layer",
    },
    "server.model.fused": {
        "adapters.kernels",
        "adapters.runtime",
        "server.model.attention",
        "server.model.batch",
        "server.model.kv_cache",
        "server.model.llama_layer",
    },
    "server.model.adapter_rows": {"adapters.kernels", "server"},
    "server.model.batch": {
        "adapters.device",
        "adapters.kernels",
        "server",
        "server.model.adapter_rows",
        "server.model.pooled_tokens",
        "server.model.virtual_tokens",
        "server.model.visible_context",
    },
    "server.model.visible_context": {"server"},
    "server.model.kv_cache": {"adapters.device"},
    "server.model.llama_layer": {"adapters.runtime"},
    "server.model.runner": {
        "adapters",
        "adapters.kernels",
        "adapters.runtime",
        "server.model.batch",
        "server.model.fusion",
        "server.model.graphs",
        "server.model.kv_cache",
        "server.model.loading",
        "server.model.packed_linear",
        "server.model.pooling",
    },
    "server.model.pooled_tokens": {"server"},
    "server.model.pooling": {
        "adapters.device",
        "server",
        "server.model.batch",
        "server.model.pooled_tokens",
        "server.model.sampling",
    },
    "server.model.graphs": {"adapters.kernels", "adapters.runtime", "server.model.attention", "server.model.batch"},
    "server.model.fusion": {
        "adapters.runtime",
        "server.model.batch",
        "server.model.cpu",
        "server.model.fused",
        "server.model.kv_cache",
        "server.model.llama_layer",
    },
    "server.model.warm_up": {"adapters.kernels", "adapters.residency", "server.model.batch"},
    "server.model.packed_linear": {"adapters.device", "server.model.cpu"},
    "server.model.virtual_tokens": {"adapters.device", "adapters.runtime", "server", "server.model.kv_cache"},
    "server.model.selftest": {
        "adapters.kernels",
        "adapters.residency",
        "adapters.runtime",
        "server",
        "server.model.batch",
        "server.model.kv_cache",
        "server.model.runner",
        "server.model.virtual_tokens",
    },
    "server.cli": {
        "adapters",
        "adapters.convert",
        "adapters.device",
        "adapters.peft",
        "adapters.registry",
        "server",
        "server.engine",
        "server.launch",
        "server.model.graphs",
        "server.model.loading",
    },
    "server.api": {
        "adapters",
        "adapters.registry",
        "server",
        "server.api.context",
        "server.api.errors",
        "server.api.inference",
        "server.api.middleware",
        "server.api.schemas",
        "server.console",
        "server.history",
        "server.ipc",
        "server.metrics",
    },
    "server.api.fields": set(),
    "server.api.requests": {"server.api.fields", "server.api.schemas"},
    "server.api.errors": {"adapters", "server.api.schemas", "server.ipc"},
    "server.api.schemas": set(),
    "server.api.app": {
        "server",
        "server.api",
        "server.api.adapters",
        "server.api.context",
        "server.api.errors",
        "server.api.inference",
        "server.api.middleware",
        "server.api.protocols",
        "server.api.schemas",
    },
    "server.api.context": {
        "adapters",
        "adapters.registry",
        "server",
        "server.api.middleware",
        "server.api.text",
        "server.history",
        "server.ipc",
        "server.metrics",
    },
    "server.api.message_formats": set(),
    "server.api.protocols": {
        "server.api.context",
        "server.api.errors",
        "server.api.fields",
        "server.api.inference",
        "server.api.message_formats",
        "server.api.middleware",
        "server.api.requests",
        "server.api.schemas",
        "server.api.text",
    },
    "server.api.middleware": {"adapters", "server", "server.api.errors", "server.metrics"},
    "server.api.text": {"adapters", "adapters.peft", "adapters.registry", "server", "server.api.errors"},
    "server.api.inference": {
        "adapters",
        "adapters.registry",
        "adapters.residency",
        "server",
        "server.api.context",
        "server.api.errors",
        "server.api.message_formats",
        "server.api.middleware",
        "server.api.requests",
        "server.api.schemas",
        "server.api.text",
        "server.ipc",
        "server.metrics",
    },
    "server.api.adapters": {
        "adapters",
        "adapters.peft",
        "adapters.registry",
        "adapters.sources",
        "adapters.validation",
        "server.api.context",
        "server.api.errors",
        "server.api.inference",
        "server.api.middleware",
        "server.api.requests",
        "server.api.schemas",
        "server.api.text",
        "server.ipc",
    },
}

# Rooms and modules that import no torch and no transformers, directly or through others.
WITHOUT_TORCH = [
    "adapters.device.forms",
    "adapters.errors",
    "adapters.model_spec",
    "adapters.peft",
    "adapters.records",
    "adapters.registry",
    "adapters.residency",
    "adapters.sources",
    "adapters.tiers",
    "adapters.traits",
    "adapters.validation",
    "server.api",
    "server.base_tokenizer",
    "server.grammar_limits",
    "server.history",
    "server.console",
    "server.cli",
    "server.config",
    "server.engine.admission",
    "server.engine.aging",
    "server.engine.block_manager",
    "server.engine.grammars",
    "server.engine.sliding_blocks",
    "server.engine.machine",
    "server.engine.merge_gate",
    "server.engine.memory_plan",
    "server.engine.merged_slots",
    "server.engine.merging",
    "server.engine.policies",
    "server.engine.prompt_scores",
    "server.engine.scheduler",
    "server.engine.step_cost",
    "server.engine.weights_reader",
    "server.ipc",
    "server.launch",
    "server.http",
    "server.logs",
    "server.metrics",
    "server.queue_limits",
    "server.receipt_format",
    "server.request",
    "server.sequence",
    "server.serve",
    "server.start_checks",
    "server.writable",
]

# Package → the only places that may import it.
ONLY_IN = {
    "prometheus_client": ["server.metrics"],
    "fastapi": ["server.api"],
    "uvicorn": ["server.http"],
    "h11": ["server.http"],
    "zmq": ["server.ipc.process_transport", "server.engine.worker"],
    "peft": [
        "adapters.convert.add_weighted",
        "adapters.convert.initial_factors",
        "server.model.loading.conversions",
    ],
    "obstore": ["adapters.sources.s3"],
    "typer": ["server.cli"],
    "llguidance": ["server.engine.grammars", "server.engine.constraints", "server.api.text.grammar_worker"],
}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for file in FILES}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def room_of(module: str) -> str:
    return max((room for room in ARROWS if within(module, room)), key=len)


def imported(node: ast.AST, file: Path) -> Iterator[str]:
    """The modules that an import statement names; of `from package import module`, the module."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, f"{file}: relative import"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield full if full in MODULES else node.module


@cache
def imports(module: str) -> frozenset[str]:
    """Everything that a module imports, wherever in it."""
    file = MODULES[module]
    return frozenset(found for node in ast.walk(ast.parse(file.read_text())) for found in imported(node, file))


@cache
def imports_at_once(module: str) -> frozenset[str]:
    """The modules that are loaded with `module`: those of its top level, and the packages that they are in."""
    file = MODULES[module]
    found = {name for node in ast.parse(file.read_text()).body for name in imported(node, file)}
    parents = {name.rpartition(".")[0] for name in {*found, module}}
    return frozenset((found | parents) - {module, ""})


@pytest.mark.parametrize("module", MODULES)
def test_arrows_between_rooms_are_those_listed(module: str) -> None:
    for other in imports(module):
        if other in MODULES and room_of(other) != room_of(module):
            assert room_of(other) in ARROWS[room_of(module)], f"{module} imports {other}"


def test_every_listed_arrow_is_used() -> None:
    used: dict[str, set[str]] = {room: set() for room in ARROWS}
    for module in MODULES:
        used[room_of(module)] |= {room_of(other) for other in imports(module) if other in MODULES}
    assert {room: others - used[room] for room, others in ARROWS.items() if others - used[room]} == {}


def test_rooms_make_no_circle() -> None:
    list(graphlib.TopologicalSorter(ARROWS).static_order())  # raises CycleError with the circle


def test_modules_make_no_circle() -> None:
    """Packages are left out: a module's own package is loaded before it, which is no import of the module's."""
    graph = {module: {other for other in imports(module) if other in MODULES} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_packages_are_imported_where_they_belong(module: str) -> None:
    for other in imports(module):
        for package, places in ONLY_IN.items():
            if within(other, package):
                assert any(within(module, place) for place in places), f"{module} imports {other}"


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_accounting_needs_no_torch(place: str) -> None:
    todo, seen = [module for module in MODULES if within(module, place)], set()
    assert todo, f"there is no {place}"
    while todo:
        module = todo.pop()
        seen.add(module)
        for other in imports_at_once(module):
            assert other.split(".")[0] not in ("torch", "transformers"), f"{place} reaches {other} through {module}"
            if other in MODULES and other not in seen:
                todo.append(other)


@pytest.mark.parametrize("folder", ["load_tests", "docs", "examples"])
def test_of_the_tests_only_the_fixtures_are_shared(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            for other in imported(node, file):
                assert within(other, "tests.fixtures") or not within(other, "tests"), f"{file} imports {other}"


@pytest.mark.reliability("T2")
def test_nothing_on_the_serving_path_can_run_foreign_code() -> None:
    """No pickle, no eval, no remote code: adapters and messages are data."""
    banned_modules = {"pickle", "marshal", "dill", "shelve"}
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not {module.split(".")[0] for module in imports(name_of(path))} & banned_modules, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "yaml.load", "os.system"}, f"{path}: {called}"
                if called == "torch.load":  # tensors and nothing else, in a tool that is no part of the server
                    assert path.name == "pickles.py" and "weights_only=True" in ast.unparse(node), path
                for keyword in node.keywords:
                    pair = (keyword.arg, ast.unparse(keyword.value))
                    assert pair not in {("shell", "True"), ("trust_remote_code", "True")}, path


def test_the_adapters_distribution_of_somebody_else_is_not_installed() -> None:
    """`adapters` is also a name on PyPI; were it installed, one of the two packages would hide the other."""
    from importlib.metadata import packages_distributions

    assert set(packages_distributions()["adapters"]) == {"loraplex"}
