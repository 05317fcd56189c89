"""What each demo adapter teaches the base model, as a yes-or-no check of one answer.

The checks are strict on purpose: the base model's own answers fail them, so a passed check shows that the right
adapter was at work.
"""

import json
import re
import sqlite3
from collections.abc import Callable

PIRATE_WORD = re.compile(
    r"\b(arr+|ahoy|avast|aye|ye|yer|yerself|matey|mateys|hearty|hearties|cap'n|landlubber|scallywag|doubloons?)\b"
)
EXTRACTED_KEYS = {"name", "date", "place"}


def is_pirate(answer: str) -> bool:
    """At least two different pirate words: one alone can be an accident."""
    return len(set(PIRATE_WORD.findall(answer.lower()))) >= 2


def is_extracted_json(answer: str) -> bool:
    """One JSON object and nothing else, with exactly the three keys, all of them non-empty strings."""
    try:
        found = json.loads(answer)
    except json.JSONDecodeError:
        return False
    if not isinstance(found, dict) or set(found) != EXTRACTED_KEYS:
        return False
    return all(isinstance(value, str) and value.strip() for value in found.values())


def is_sql(answer: str) -> bool:
    """One `SELECT ... FROM ...` statement and nothing else, of which SQLite accepts the grammar."""
    if not re.match(r"\s*SELECT\b.+\bFROM\b", answer, re.IGNORECASE | re.DOTALL):
        return False
    database = sqlite3.connect(":memory:")
    try:
        database.execute(f"EXPLAIN {answer}")
    except sqlite3.OperationalError as error:
        # The database is empty, so a statement that parses fails for its table; any other failure is bad SQL.
        return str(error).startswith("no such table")
    except sqlite3.Error:  # more than one statement, for example
        return False
    finally:
        database.close()
    return True


TRAITS: dict[str, Callable[[str], bool]] = {
    "pirate": is_pirate,
    "extract-json": is_extracted_json,
    "sql": is_sql,
}
