"""What the README says is what the code does."""

from pathlib import Path

from docs import compatibility
from docs.tables import README, render

ROOT = Path(__file__).parent.parent


def test_the_readme_s_tables_are_those_of_the_code() -> None:
    text = README.read_text()
    assert render(text) == text, "run 'make docs'"


def test_the_compatibility_tables_are_those_of_the_tests() -> None:
    text = compatibility.DOCUMENT.read_text()
    assert render(text, compatibility.TABLES) == text, "run 'make docs'"


def test_every_file_that_the_readme_names_exists() -> None:
    import re

    text = README.read_text()
    for path in re.findall(r"`((?:server|adapters)/[\w/.]*)`", text) + re.findall(r"\]\(([\w/.]+)\)", text):
        assert (ROOT / path).exists(), path


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    assert "\nmake test\n" in README.read_text()
    assert "\ntest-all: test " in (ROOT / "Makefile").read_text()
    assert "\nmake test-all\n" in (ROOT / ".ci" / "run").read_text()
