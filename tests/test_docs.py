"""The documents agree with the code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from adapters.errors import ProblemCode
from docs import compatibility, tables

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


def length_of(name: str) -> int:
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def reading_list() -> dict[str, int]:
    """Return the files to read for a decode step, with the lengths that architecture.md states."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    return {name: int(lines) for name, lines in re.findall(r"^\| \d+ \| `([\w/.]+)` \| (\d+) \|", text, re.MULTILINE)}


def test_the_files_to_read_for_a_decode_step_are_about_as_long_as_architecture_md_states() -> None:
    stated = reading_list()
    lines = {name: length_of(name) for name in stated}
    assert stated
    assert {name: lines[name] for name in stated if abs(lines[name] - stated[name]) > 0.25 * lines[name] + 10} == {}
    total = f"{len(stated)} files and {sum(stated.values()):,} lines"
    assert total in ARCHITECTURE.read_text(encoding="utf-8")


def test_a_decode_step_takes_no_more_reading_than_it_did() -> None:
    stated = reading_list()
    assert len(stated) <= 15 and sum(map(length_of, stated)) <= 2250


def test_the_files_that_the_reading_list_leaves_out_are_about_as_long_as_architecture_md_states() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    part = text[text.index("that the table leaves out") : text.index("## Where to change what")]
    names = re.findall(r"`([\w/]+\.\w+)`", part)
    files, lines, all_files, all_lines = (
        int(number.replace(",", ""))
        for number in re.findall(r"([\d,]+) files and ([\d,]+) lines more, ([\d,]+) files and ([\d,]+) lines", part)[0]
    )
    stated = reading_list()
    assert (files, all_files) == (len(names), len(names) + len(stated)) and not stated.keys() & set(names)
    assert all_lines == lines + sum(stated.values()) and abs(sum(map(length_of, names)) - lines) <= 0.1 * lines


def test_continuous_integration_runs_the_readme_s_test_command() -> None:
    assert "\nmake test\n" in README.read_text(encoding="utf-8")
    assert "\ntest-all: test " in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\nmake test-all\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_every_image_has_the_compiler_that_its_kernels_need(target: str) -> None:
    """The CPU's kernels are C++, and Triton compiles its launchers in C."""
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", (ROOT / "Dockerfile").read_text(), re.M | re.S))
    assert re.search(r"apt-get install .*\bg\+\+", stages[target])
