"""The command line: flags of `serve`, and the client commands against a running server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.peft.files import FILES
from server import config
from server.cli.main import app
from server.config import ConfigError, ServeConfig
from server.start_checks import check_start
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.api_server import LiveServer, listening

runner = CliRunner()


def test_flags_beat_the_environment_which_beats_the_file_which_beats_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1\nadapter-slots = 2\nmax_num_seqs = 3\nallow_source = ["file:///a", "file:///b"]\n')
    monkeypatch.setenv("LORAPLEX_ADAPTER_SLOTS", "4")
    monkeypatch.setenv("LORAPLEX_MAX_NUM_SEQS", "5")
    loaded = config.load({"max_num_seqs": 6}, file)
    assert (loaded.port, loaded.adapter_slots, loaded.max_num_seqs) == (1, 4, 6)
    assert loaded.allow_source == ("file:///a", "file:///b")
    assert loaded.max_batch_tokens == ServeConfig().max_batch_tokens


def test_a_yaml_file_works_as_well(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("port: 9\nadapter: [a=/x, b=/y]\ndemo: true\n")
    loaded = config.load({}, file)
    assert (loaded.port, loaded.adapter, loaded.demo) == (9, ("a=/x", "b=/y"), True)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": "70000"}, "--port"),
        ({"port": "many"}, "--port"),
        ({"adapter_slots": 0}, "--adapter-slots"),
        ({"dtype": "float8"}, "float8"),
        ({"quantization": "int3"}, "int3"),
        ({"drain_timeout": float("nan")}, "--drain-timeout"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(flags: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config.load(flags)


def test_an_unknown_setting_in_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("adaptor_slots = 2\n")
    with pytest.raises(ConfigError, match="adaptor_slots"):
        config.load({}, file)


def test_a_config_survives_the_way_to_the_engine_process() -> None:
    made = config.load({"port": 0, "data_dir": "/x", "allow_source": ["file:///a"], "demo": True})
    assert config.load(json.loads(json.dumps(config.to_dict(made)))) == made


@pytest.mark.parametrize("entry", ["nonsense", "hf://", "s3://", "file://host/x", "http://localhost/"])
def test_no_server_starts_with_a_source_that_allows_nothing(entry: str) -> None:
    with pytest.raises(ConfigError, match="--allow-source"):
        check_start(ServeConfig(allow_source=("file:///srv", entry)))


def test_no_server_starts_watching_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--watch-adapters .*does not exist"):
        check_start(ServeConfig(watch_adapters=str(tmp_path / "nowhere")))


def test_serve_reports_a_bad_flag_in_one_line() -> None:
    result = runner.invoke(app, ["serve", "--dtype", "float8"])
    assert result.exit_code == 2
    assert "float8" in result.stderr and "Traceback" not in result.stderr


def test_every_setting_has_a_flag() -> None:
    shown = runner.invoke(app, ["serve", "--help"], terminal_width=200, color=False).output
    for name in config.HINTS:
        assert config.flag_name(name) in shown


# -- the client side ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_llama(), tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    with listening(tmp_path) as live:
        monkeypatch.setenv("LORAPLEX_URL", live.url)
        yield live


def run(*words: str, **options: Any) -> Any:
    result = runner.invoke(app, list(words), **options)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("server")
def test_the_life_of_an_adapter_from_the_command_line(adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tiny_llama(), tmp_path / "other", seed=1)
    assert json.loads(run("adapters", "push", "mine", str(adapter), "--dry-run"))["report"]["applied"]["modules"] == 4
    assert json.loads(run("adapters", "ls", "--json")) == []
    first = json.loads(run("adapters", "push", "mine", str(adapter), "--json"))
    second = json.loads(run("adapters", "push", "mine", str(other), "--replace", "--json"))
    assert first["version"] != second["version"]
    assert "mine" in run("adapters", "ls")
    assert [v["version"] for v in json.loads(run("adapters", "versions", "mine", "--json"))] == [
        second["version"],
        first["version"],
    ]
    assert json.loads(run("adapters", "rollback", "mine", "--json"))["version"] == first["version"]
    assert json.loads(run("adapters", "load", "mine", "--json"))["tier"] == "device"
    assert json.loads(run("adapters", "pin", "mine", "--json"))["pinned"] is True
    assert json.loads(run("adapters", "unpin", "mine", "--json"))["pinned"] is False
    assert json.loads(run("adapters", "unload", "mine", "--json"))["tier"] == "disk"
    assert json.loads(run("adapters", "show", "mine"))["name"] == "mine"
    assert json.loads(run("adapters", "rm", "mine"))["deleted"] is True


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("server")
def test_what_was_pushed_can_be_pulled(adapter: Path, tmp_path: Path) -> None:
    other = write_adapter(tiny_llama(), tmp_path / "other", seed=1)
    (other / "chat_template.jinja").write_bytes(b"x")
    pushed = {name: data for name, data in files(adapter).items() if name in FILES}
    first = json.loads(run("adapters", "push", "mine", str(adapter), "--json"))["version"]
    run("adapters", "push", "mine", str(other), "--replace")
    run("adapters", "pull", f"mine@{first}", str(tmp_path / "first"))
    run("adapters", "pull", "mine", str(tmp_path / "second"))
    assert files(tmp_path / "first") == pushed != files(tmp_path / "second")
    assert files(tmp_path / "second")["chat_template.jinja"] == b"x"
    refused = runner.invoke(app, ["adapters", "pull", "mine", str(tmp_path / "first")])
    assert refused.exit_code == 1 and "exists already" in refused.stderr
    assert files(tmp_path / "first") == pushed
    run("adapters", "pull", "mine", str(tmp_path / "first"), "--force")
    assert files(tmp_path / "first") == files(tmp_path / "second")
    run("adapters", "pull", f"mine@{first}", str(tmp_path / "second"), "--force")
    assert files(tmp_path / "second") == pushed
    for name in ("nobody", "mine@000000000000", "mine@x"):
        refused = runner.invoke(app, ["adapters", "pull", name, str(tmp_path / "nothing")])
        assert refused.exit_code == 1 and len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "nothing").exists()


@pytest.mark.usefixtures("server")
def test_defaults_from_the_command_line(adapter: Path, tmp_path: Path) -> None:
    run("adapters", "push", "mine", str(adapter))
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1].content }}")
    settings = ["--system-prompt", "Be kind.", "--description", "Mine", "--label", "team=a=b", "--label", "tier=gold"]
    settings += ["--chat-template", str(template), "--default", "temperature=0.2", "--default", "stop=END"]
    record = json.loads(run("adapters", "set", "mine", *settings, "--json"))
    assert (record["description"], record["labels"]) == ("Mine", {"team": "a=b", "tier": "gold"})
    defaults = {"temperature": 0.2, "stop": "END", "system_prompt": "Be kind.", "chat_template": template.read_text()}
    assert record["defaults"] == defaults
    gone = ["description", "label.team", "stop", "chat_template", "system_prompt"]
    record = json.loads(run("adapters", "set", "mine", *(f"--unset={each}" for each in gone), "--json"))
    assert (record["description"], record["labels"]) == (None, {"tier": "gold"})
    assert record["defaults"] == {"temperature": 0.2}
    for words, says in (
        (["--default", "temperature=9"], "defaults.temperature"),
        (["--default", "temperature"], "field=value"),
        (["--chat-template", str(tmp_path / "nothing")], "cannot be read"),
        (["--unset", "colour"], "defaults.colour"),
    ):
        refused = runner.invoke(app, ["adapters", "set", "mine", *words])
        assert refused.exit_code == 1 and says in refused.stderr


@pytest.mark.usefixtures("server")
def test_splitting_from_the_command_line(adapter: Path) -> None:
    for name in ("stable", "canary"):
        run("adapters", "push", name, str(adapter))
    made = json.loads(run("adapters", "split", "prod", "stable=90", "canary=10"))
    assert made == json.loads(run("adapters", "show", "prod"))
    assert made["weights"] == {"stable": 90, "canary": 10}
    for word in ("stable", "stable=", "stable=-1", "stable=inf", "stable=many", "=1"):
        refused = runner.invoke(app, ["adapters", "split", "prod", word])
        assert refused.exit_code == 1 and f"{word} must have the form adapter=weight" in refused.stderr
    assert json.loads(run("adapters", "unsplit", "prod")) == {"name": "prod", "deleted": True}
    assert runner.invoke(app, ["adapters", "show", "prod"]).exit_code == 1


@pytest.mark.usefixtures("server")
def test_merging_from_the_command_line(adapter: Path) -> None:
    run("adapters", "push", "mine", str(adapter))
    assert json.loads(run("merge", "mine", "--drain"))["adapter"] == "mine"
    assert json.loads(run("unmerge"))["state"] == "none"


@pytest.mark.usefixtures("server")
def test_a_refusal_is_told_in_the_server_s_words(adapter: Path, tmp_path: Path) -> None:
    refused = runner.invoke(app, ["adapters", "show", "nobody"])
    assert refused.exit_code == 1 and "nobody" in refused.stderr
    config_file = json.loads((adapter / "adapter_config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    (broken / "adapter_config.json").write_text(json.dumps({**config_file, "use_bdlora": True}))
    refused = runner.invoke(app, ["adapters", "push", "broken", str(broken)])
    assert refused.exit_code == 1 and "use_bdlora" in refused.stderr
    empty = runner.invoke(app, ["adapters", "push", "empty", str(tmp_path / "nothing")])
    assert empty.exit_code == 1 and "adapter_config.json" in empty.stderr


def test_a_server_that_is_not_there_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_URL", "http://127.0.0.1:9")
    refused = runner.invoke(app, ["adapters", "ls"])
    assert refused.exit_code == 1 and "cannot reach the server" in refused.stderr


@pytest.mark.usefixtures("server")
def test_chat_streams_answers_until_an_empty_line() -> None:
    said = run("chat", "--max-tokens", "8", input="hello\n\n")
    assert len(said) > len("> > ")
