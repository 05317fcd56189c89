"""Docstrings are plain English: the first sentence names its subject."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ["adapters", "server"]
# A docstring that begins with one of these words is a clause without a verb.
CLAUSES = ("What", "Whether", "Of", "Who", "Whoever", "Where")


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_begin_with_a_verb_or_a_noun(folder: str) -> None:
    files = sorted((ROOT / folder).glob("**/*.py"))
    assert files
    found = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (text := ast.get_docstring(node))
        and text.split()[0].rstrip(",:;.") in CLAUSES
    ]
    assert not found, "\n".join(found)
