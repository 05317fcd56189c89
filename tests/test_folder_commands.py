"""`loraplex convert` and `loraplex merge-adapters` from the command line."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapters.convert import peft_folder as plain_lora
from server.cli.main import app
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.api_server import LiveServer, listening

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_llama()
    write_adapter(model, folder / "a")
    write_adapter(model, folder / "b", seed=1, r=4)
    write_adapter(model, folder / "dora", use_dora=True)
    q = "model.layers.0.self_attn.q_proj"
    state = {f"enc{q}.lora_A": torch.randn(8, 64), f"enc{q}.lora_B": torch.randn(32, 4)}
    torch.save(state, folder / "checkpoint.pt")
    return folder


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    (tmp_path / "server").mkdir()
    with listening(tmp_path / "server") as live:
        monkeypatch.setenv("LORAPLEX_URL", live.url)
        yield live


def run(*words: object) -> str:
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def refused(into: Path, *words: object) -> str:
    """The one line of a command that fails, and leaves nothing behind."""
    before = sorted(into.iterdir())
    result = runner.invoke(app, [str(word) for word in words])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    assert sorted(into.iterdir()) == before
    return result.stderr


def test_the_help_names_the_commands() -> None:
    shown = run("--help")
    assert "convert" in shown and "merge-adapters" in shown


def test_a_checkpoint_of_loralib_becomes_an_adapter_that_the_server_takes(
    folder: Path, tmp_path: Path, server: LiveServer
) -> None:
    masks = ("--enable-lora", "q_proj=true,False,false,true", "--rename", "enc=")
    run("convert", folder / "checkpoint.pt", tmp_path / "made", "--alpha", 6, *masks)
    record = json.loads(run("adapters", "push", "mine", tmp_path / "made", "--json"))
    assert record["rank"] == 8 and record["target_modules"] == ["q_proj"]


def test_an_adapter_of_a_residual_base_becomes_plain(folder: Path, tmp_path: Path) -> None:
    run("convert", folder / "a", tmp_path / "made", "--initial", folder / "a")
    for factors in plain_lora.read(tmp_path / "made").values():
        assert len(factors.a) == 16 and torch.allclose(factors.b @ factors.a, torch.zeros(()), atol=1e-6)


def test_conversions_that_fail_leave_nothing(folder: Path, tmp_path: Path) -> None:
    checkpoint, made = folder / "checkpoint.pt", tmp_path / "made"
    assert "--enable-lora" in refused(tmp_path, "convert", checkpoint, made, "--alpha", 6)
    assert "--alpha" in refused(tmp_path, "convert", checkpoint, made)
    assert "--alpha" in refused(tmp_path, "convert", checkpoint, made, "--alpha", "nan")
    assert "--alpha" in refused(tmp_path, "convert", folder / "a", made, "--initial", folder / "a", "--alpha", 6)
    assert "--initial" in refused(tmp_path, "convert", checkpoint, made, "--initial", folder / "a", "--alpha", 6)
    assert "needs no conversion" in refused(tmp_path, "convert", folder / "a", made)
    assert "not what" in refused(tmp_path, "convert", folder / "a", made, "--initial", folder / "b")
    assert "No such file" in refused(tmp_path, "convert", folder / "a", made, "--initial", folder / "nothing")
    assert "exists" in refused(tmp_path, "convert", folder / "a", folder / "b", "--initial", folder / "a")
    for mask in ("q_proj", "q_proj=false", "q_proj=1,0"):
        assert "--enable-lora" in refused(tmp_path, "convert", checkpoint, made, "--alpha", 6, "--enable-lora", mask)


def test_adapters_of_the_server_and_folders_become_a_new_adapter(
    folder: Path, tmp_path: Path, server: LiveServer
) -> None:
    version = json.loads(run("adapters", "push", "mine", folder / "a", "--json"))["version"]
    made = run("merge-adapters", "sum", f"mine@{version}=1.5", f"{folder / 'b'}=-0.25").strip()
    record = json.loads(run("adapters", "show", "sum"))
    assert record["version"] == made and record["rank"] == 8 + 4
    run("adapters", "pull", "sum", tmp_path / "sum")
    a, b = plain_lora.read(folder / "a"), plain_lora.read(folder / "b")
    for module, factors in plain_lora.read(tmp_path / "sum").items():
        expected = 1.5 * 2 * a[module].b @ a[module].a - 0.25 * 4 * b[module].b @ b[module].a
        torch.testing.assert_close(factors.scaling * factors.b @ factors.a, expected)
    taken = runner.invoke(app, ["merge-adapters", "sum", "mine=1", "mine=1", "--method", "linear"])
    assert taken.exit_code == 1 and "sum" in taken.stderr
    run("merge-adapters", "sum", "mine=1", "mine=1", "--method", "linear", "--replace")


def test_a_folder_can_be_written_without_any_server(folder: Path, tmp_path: Path) -> None:
    parts = (f"{folder / 'a'}=1", f"{folder / 'b'}=1")
    run("merge-adapters", "sum", *parts, "--output", tmp_path / "sum", "--method", "ties_svd", "--density", 0.5)
    assert {len(factors.a) for factors in plain_lora.read(tmp_path / "sum").values()} == {8}


def test_merges_that_fail_leave_nothing(folder: Path, tmp_path: Path) -> None:
    def fails(*words: object) -> str:
        return refused(tmp_path, "merge-adapters", "sum", *words, "--output", tmp_path / "sum")

    a, b = f"{folder / 'a'}=1", f"{folder / 'b'}=1"
    assert "different ranks" in fails(a, b, "--method", "linear")
    assert "unknown method 'sum'" in fails(a, b, "--method", "sum")
    assert "density" in fails(a, a, "--method", "ties")
    assert "dora" in fails(a, f"{folder / 'dora'}=1")
    assert "nowhere" in fails(a, f"{folder / 'nowhere'}=1")
    for part in ("mine", "mine=", "=1", "mine=much", "mine=inf"):
        assert "part=weight" in fails(part)
