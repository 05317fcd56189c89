"""`loraplex doctor` says what the server would use on this machine, and why."""

import json

import pytest
from typer.testing import CliRunner

from adapters.device.forms import FORCED, FORMS, NONE
from server.cli.main import app
from tests.fixtures.native_forms import forget


def asked(*arguments: str) -> str:
    forget()
    result = CliRunner().invoke(app, ["doctor", *arguments])
    forget()
    assert result.exit_code == 0, result.output
    return result.output


def test_every_form_is_listed_with_what_stands_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, NONE)
    found = json.loads(asked("--json"))
    assert set(found["native code"]) == {"used", "compiler", *(form.name for form in FORMS)}
    assert found["native code"]["used"].startswith(f"none ({FORCED}")
    assert found["machine"]["threads of the model"].isdigit()
    assert found["packages"]["torch"]


def test_a_forced_form_that_cannot_be_used_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "sse9")
    assert "names no form" in json.loads(asked("--json"))["native code"]["used"]


def test_people_get_tables() -> None:
    assert "CPU quota of the container" in asked()
