"""`loraplex sync`: the plan, and that it leads where the file says."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from click.testing import Result
from peft import IA3Config
from typer.testing import CliRunner

from adapters.peft.digest import digest_of
from server.cli.main import app
from tests.fixtures import remote_servers
from tests.fixtures.adapter_factory import tiny_llama, write_adapter, write_peft_adapter
from tests.fixtures.api_server import LiveServer, listening
from tests.fixtures.remote_servers import COMMIT, Remote
from tests.fixtures.timing import HANG_SECONDS, wait_for

runner = CliRunner()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("a", "b", "c")):
        write_adapter(tiny_llama(), folder / name, seed=seed)
    return folder


@pytest.fixture
def hub(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    with remote_servers.hub() as remote:
        remote_servers.use_hub(remote, monkeypatch)
        offer(remote, adapters / "a")
        yield remote


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    with listening(tmp_path, allow_source=("hf://org",)) as live:
        monkeypatch.setenv("LORAPLEX_URL", live.url)
        yield live


def offer(hub: Remote, folder: Path) -> None:
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    """`adapters.yaml` beside the adapters' folders."""
    path = folder / "adapters.yaml"
    path.write_text(yaml.safe_dump({"adapters": list(entries)}))
    return path


def invoke(*words: object, answer: str | None = None) -> Result:
    return runner.invoke(app, ["sync", *map(str, words)], input=answer)


def plan(*words: object) -> list[tuple[str, str]]:
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.output
    return [(step["action"], step["name"]) for step in json.loads(result.stdout.splitlines()[0])["steps"]]


def state(server: LiveServer) -> dict[str, tuple[str, bool]]:
    records, _ = server.context.registry.records()
    return {record.name: (record.version.digest, record.pinned) for record in records}


def test_the_server_becomes_what_the_file_says(adapters: Path, server: LiveServer) -> None:
    file = write(adapters, {"name": "one", "source": "a", "pinned": True}, {"name": "two", "source": "./b"})
    assert plan(file, "--yes") == [("create", "one"), ("create", "two"), ("pin", "one")]
    a, b, c = (digest_of(adapters / name) for name in ("a", "b", "c"))
    assert state(server) == {"one": (a, True), "two": (b, False)}
    assert plan(file, "--yes") == []

    file = write(adapters, {"name": "one", "source": "c"}, {"name": "three", "source": "b", "pinned": True})
    assert plan(file, "--yes") == [("unpin", "one"), ("create", "three"), ("replace", "one"), ("pin", "three")]
    assert state(server) == {"one": (c, False), "two": (b, False), "three": (b, True)}
    assert plan(file, "--yes", "--prune") == [("delete", "two")]
    assert state(server) == {"one": (c, False), "three": (b, True)}
    assert plan(file, "--prune") == []


def test_a_dry_run_and_a_no_change_nothing(adapters: Path, server: LiveServer) -> None:
    file = write(adapters, {"name": "one", "source": "a"})
    shown = invoke(file, "--dry-run")
    assert shown.exit_code == 0 and "create  one from a" in shown.stdout and state(server) == {}
    assert invoke(file, answer="n\n").exit_code == 1 and state(server) == {}
    assert invoke(file).exit_code == 1 and state(server) == {}  # nobody is there to ask
    assert invoke(file, answer="y\n").exit_code == 0 and list(state(server)) == ["one"]


def test_what_the_file_does_not_list_is_named_and_kept(adapters: Path, server: LiveServer) -> None:
    invoke(write(adapters, {"name": "one", "source": "a"}, {"name": "two", "source": "a"}), "--yes")
    shown = invoke(write(adapters, {"name": "one", "source": "a"}), "--yes")
    assert "Nothing to do: 1 unchanged" in shown.stdout and "two" in shown.stdout
    assert list(state(server)) == ["one", "two"]


def test_unchanged_folders_are_not_uploaded(
    adapters: Path, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(adapters, {"name": "one", "source": "a"})
    invoke(file, "--yes")
    monkeypatch.setattr("server.cli.sync.upload", None)
    assert plan(file, "--yes") == []


def test_every_kind_of_folder_is_recognised(adapters: Path, server: LiveServer) -> None:
    write_peft_adapter(tiny_llama(), adapters / "ia3", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    write_adapter(tiny_llama(), adapters / "with-template")
    (adapters / "with-template" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    file = write(adapters, *({"name": name, "source": name} for name in ("ia3", "with-template")))
    assert plan(file, "--yes") == [("create", "ia3"), ("create", "with-template")]
    assert plan(file, "--yes") == []
    (adapters / "with-template" / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert plan(file, "--yes") == [("replace", "with-template")]


def test_what_a_hub_s_branch_has_now(adapters: Path, server: LiveServer, hub: Remote) -> None:
    file = write(adapters, {"name": "one", "source": "hf://org/repo@main"})
    assert plan(file, "--yes") == [("create", "one")]
    assert plan(file, "--yes") == []
    offer(hub, adapters / "b")
    assert plan(file, "--yes") == [("replace", "one")]
    assert state(server) == {"one": (digest_of(adapters / "b"), False)}


def test_a_commit_is_not_fetched_again(adapters: Path, server: LiveServer, hub: Remote) -> None:
    file = write(adapters, {"name": "one", "source": f"hf://org/repo@{COMMIT}"})
    assert plan(file, "--yes") == [("create", "one")]
    hub.requests.clear()
    assert plan(file, "--yes") == [] and hub.requests == []


def test_a_failed_registration_is_made_good(adapters: Path, server: LiveServer, hub: Remote) -> None:
    body = {"name": "one", "source": "hf://org/none", "lazy": True}
    httpx.post(f"{server.url}/v1/adapters", json=body, timeout=HANG_SECONDS).raise_for_status()
    wait_for(lambda: server.context.registry.pending["one"].error, "the failure")
    assert plan(write(adapters, {"name": "one", "source": "a"}), "--yes") == [("create", "one")]
    assert not server.context.registry.pending and list(state(server)) == ["one"]


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "two", "source": "absent"},
        {"name": "two", "source": "hf://other/repo@main"},
        {"name": "two", "source": "broken"},
        {"name": "two", "source": "wide"},
    ],
)
def test_one_source_that_cannot_be_had_stops_everything_before_it_begins(
    adapters: Path, server: LiveServer, hub: Remote, entry: dict[str, Any]
) -> None:
    write_adapter(tiny_llama(), adapters / "wide", r=32)  # the server's largest is 16
    (adapters / "broken").mkdir(exist_ok=True)
    (adapters / "broken" / "adapter_config.json").write_text("[]")
    (adapters / "broken" / "adapter_model.safetensors").write_text("")
    result = invoke(write(adapters, {"name": "one", "source": "a"}, entry), "--yes")
    assert result.exit_code in (1, 2) and result.stderr.startswith("error: ")
    assert state(server) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapters: {}", "array"),
        ("", "object"),
        ("adapters: [{name: one}]", "source"),
        ("adapters: [{name: one, source: a, pined: true}]", "pined"),
        ("adapters: [{name: one, source: a, pinned: maybe}]", "bool"),
        ("adapters: [{name: a b, source: a}]", "256 characters"),
        ("adapters: [{name: one, source: a}, {name: one, source: b}]", "2 times"),
        ("adapters: [", "adapters.yaml"),
        ("!!python/object/apply:os.system [exit]", "adapters.yaml"),
    ],
)
def test_files_that_say_nothing_clear(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "adapters.yaml").write_text(text)
    result = invoke(tmp_path / "adapters.yaml", "--yes")
    assert result.exit_code == 2 and said in result.stderr, result.output


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert invoke(tmp_path / "adapters.yaml").exit_code == 2
