"""Print docstrings and comments of the code, drawn at random, for a reader to judge their English.

python -m docs.sample [--count 60] [--seed 16]
"""

import argparse
import ast
import io
import random
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEAST_WORDS = 4


def texts() -> Iterator[tuple[str, str]]:
    """Yield the place and the text of every docstring and comment of some length in `adapters` and `server`."""
    for file in sorted([*ROOT.glob("adapters/**/*.py"), *ROOT.glob("server/**/*.py")]):
        source, where = file.read_text(), file.relative_to(ROOT)
        yield from ((f"{where}:{line}", text) for line, text in [*docstrings(source), *comments(source)])


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and len(token.string.split()) > LEAST_WORDS:
            yield token.start[0], token.string


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=16)
    options = parser.parse_args()
    for place, text in random.Random(options.seed).sample(sorted(texts()), options.count):
        print(f"{place}\n    {' '.join(text.split())}")


if __name__ == "__main__":
    main()
