"""The documents agree with the code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from adapters.errors import ProblemCode
from docs import compatibility, tables
from docs.reading_list import left_out, length_of, listed, recounted

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_reference_page_are_those_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.render(text, tables.PAGES[page]) == text, "run 'make docs'"


def test_the_compatibility_tables_are_those_of_the_tests() -> None:
    text = compatibility.DOCUMENT.read_text(encoding="utf-8")
    assert tables.render(text, compatibility.TABLES) == text, "run 'make docs'"


def test_every_error_code_that_is_explained_exists() -> None:
    errors = tables.api_errors()
    assert [code for code in tables.CODES if f"`{code}`" not in errors] == []
    assert set(tables.PROBLEMS) == set(get_args(ProblemCode))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    assert [name for name in files_named(page) if not (page.parent / name).exists()] == []
    assert [name for name in paths_named(page) if not (ROOT / name).exists()] == []


def files_named(page: Path) -> Iterator[str]:
    """Yield the targets of the links and images of `page` within the repository, relative to it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path = target.partition("#")[0]
        if path and "://" not in path:
            yield path


def paths_named(page: Path) -> list[str]:
    """Return the paths from the root that `page` has as code."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"`((?:server|adapters|tests|docs|examples|load_tests)/[\w/.]*)`", text)


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def numbers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_the_reading_list_of_architecture_md_is_about_as_long_as_it_states() -> None:
    """`make docs` counts anew. A few lines more or less do not matter."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    for stated, counted in zip(text.splitlines(), recounted(text).splitlines(), strict=True):
        assert numbers(stated) == pytest.approx(numbers(counted), rel=0.25, abs=10), stated


def test_the_reading_list_names_no_file_twice() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    names = [*listed(text), *left_out(text)]
    assert len(names) == len(set(names))


def test_a_decode_step_takes_no_more_reading_than_it_did() -> None:
    files = listed(ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(files) <= 15 and sum(map(length_of, files)) <= 2000


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    assert "\nmake test\n" in README.read_text(encoding="utf-8")
    assert "\ntest-all: test " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nmake test-all\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_image_has_the_compiler_that_its_kernels_need(target: str) -> None:
    """The CPU's kernels are C++, and Triton compiles its launchers in C."""
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S))
    assert re.search(r"apt-get install .*\bg\+\+", stages[target])
