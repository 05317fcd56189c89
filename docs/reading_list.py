"""The lengths of files in the reading list of architecture.md. `python -m docs.reading_list` counts them anew."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"

_ROW = re.compile(r"^(\| \d+ \| `([\w/.]+)` \| )(\d+)( \|)", re.MULTILINE)
_TABLE_TOTAL = re.compile(r"The table has [\d,]+ files and [\d,]+ lines")
_ALL_TOTALS = re.compile(r"These are [\d,]+ files and [\d,]+ lines more, [\d,]+ files and [\d,]+ lines together")


def length_of(name: str) -> int:
    """Return the number of lines of a file of the repository."""
    return len((ROOT / name).read_text(encoding="utf-8").splitlines())


def listed(text: str) -> dict[str, int]:
    """Return the files of the table, with the lengths that it states."""
    return {name: int(lines) for _, name, lines, _ in _ROW.findall(text)}


def left_out(text: str) -> list[str]:
    """Return the files that a decode step also runs, and that the table leaves out."""
    part = text[text.index("that the table leaves out") : text.index("## Where to change what")]
    return re.findall(r"`([\w/]+\.\w+)`", part)


def recounted(text: str) -> str:
    """Return architecture.md with the lengths and totals of today."""
    text = _ROW.sub(lambda row: f"{row[1]}{length_of(row[2])}{row[4]}", text)
    files, lines = len(listed(text)), sum(listed(text).values())
    others = left_out(text)
    other_lines = sum(map(length_of, others))
    text = _TABLE_TOTAL.sub(f"The table has {files} files and {lines:,} lines", text)
    more = f"{len(others)} files and {other_lines:,} lines more"
    return _ALL_TOTALS.sub(
        f"These are {more}, {files + len(others)} files and {lines + other_lines:,} lines together", text
    )


if __name__ == "__main__":
    ARCHITECTURE.write_text(recounted(ARCHITECTURE.read_text(encoding="utf-8")), encoding="utf-8")
