"""Aliases: names that distribute requests over several adapters by weight, and their table."""

import hashlib
import math
import random
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

BASE_MEMBER = ""  # the base model as a member, whatever its name is; not a valid adapter name


@dataclass(frozen=True, slots=True)
class Alias:
    """Weights of an alias's members, by adapter name: 0 or more, at least one above 0. `created` is
    in Unix seconds."""

    name: str
    weights: Mapping[str, float]
    created: int

    def pick(self, user: str | None) -> str:
        """Choose one of the members by weight: always the same one for a `user`, at random without a user.

        Weighted rendezvous hashing (Schindelhauer and Schomaker, 2005): every user has a pseudo-random number for every
        member, and the member with the smallest -ln(number) / weight is chosen. A member whose weight grows takes users
        from others, and no user moves between two others.
        """
        members = [(name, weight) for name, weight in self.weights.items() if weight]
        if not user:
            names, weights = zip(*members, strict=True)
            return str(random.choices(names, weights)[0])
        return min(members, key=lambda member: -math.log(_draw(self.name, user, member[0])) / member[1])[0]


def _draw(*parts: str) -> float:
    """Return a pseudo-random number in (0, 1), the same for the same parts on every server."""
    digest = hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / (1 << 48)


def read_aliases(db: sqlite3.Connection) -> dict[str, Alias]:
    """Read all aliases by name."""
    with closing(db.execute("SELECT alias, member, weight, created FROM splits ORDER BY alias, member")) as cursor:
        groups = [(name, list(rows)) for name, rows in groupby(cursor, key=itemgetter("alias"))]
    return {name: Alias(name, {r["member"]: r["weight"] for r in rows}, rows[0]["created"]) for name, rows in groups}


def write_alias(db: sqlite3.Connection, alias: Alias) -> None:
    """Write the alias, replacing any of the same name. Call in a transaction."""
    delete_alias(db, alias.name)
    rows = [(alias.name, member, weight, alias.created) for member, weight in alias.weights.items()]
    db.executemany("INSERT INTO splits VALUES (?, ?, ?, ?)", rows)


def delete_alias(db: sqlite3.Connection, name: str) -> None:
    """Delete the alias, if there is one. Call in a transaction."""
    db.execute("DELETE FROM splits WHERE alias = ?", (name,))
