"""The file of API keys (`--keys-file`): reading, checking and changing it.

The file holds digests; a secret is shown once, by `loraplex keys new`. SHA-256 without salt or stretching is enough for
secrets of at least 128 random bits, which nobody can guess.
"""

import hashlib
import math
import os
import secrets
import string
import tomllib
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from server.config import ConfigError

KeyScope = Literal["infer", "observe", "admin"]
ALL_SCOPES: frozenset[KeyScope] = frozenset(get_args(KeyScope))
LEAST_BITS = 128
PREFIX = "lpx_"  # lets scanners for leaked secrets recognise a key

_NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]
_Limit = Annotated[int, msgspec.Meta(ge=1, lt=1 << 53)] | None
_ALPHABETS = (string.digits, "0123456789abcdef", string.ascii_lowercase, string.ascii_letters + string.digits)
_HEADER = "# API keys of Loraplex. Change it with `loraplex keys`, or by hand; a running server notices.\n"


class KeyEntry(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One `[[keys]]` table. A key with an allow-list of `adapters` cannot observe: metrics name all adapters."""

    name: _NonEmpty
    key: _NonEmpty | None = None
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")] | None = None
    scopes: frozenset[KeyScope] = frozenset({"infer"})
    tenant: str | None = None
    adapters: frozenset[str] | None = None
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    weight: Annotated[float, msgspec.Meta(ge=0.01, le=100)] = 1.0
    max_concurrent: _Limit = None
    requests_per_minute: _Limit = None
    tokens_per_minute: _Limit = None
    max_adapters: _Limit = None
    max_adapter_bytes: _Limit = None

    def __post_init__(self) -> None:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"the key '{self.name}' must have either 'key' or 'sha256'")
        if self.adapters is not None and "observe" in self.scopes:
            raise ValueError(f"the key '{self.name}' has an allow-list and the scope 'observe', which shows all names")

    @property
    def digest(self) -> str:
        return self.sha256 or digest_of(self.key or "")

    @property
    def its_tenant(self) -> str:
        return self.name if self.tenant is None else self.tenant


class _KeysFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[KeyEntry]


def digest_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def bits_of(secret: str) -> float:
    """Return the bits of a random secret of these characters. Few distinct characters are no random secret."""
    alphabet = next((len(known) for known in _ALPHABETS if set(secret) <= set(known)), 64)
    return 0.0 if len(set(secret)) < 8 else len(secret) * math.log2(alphabet)


def new_secret() -> str:
    """Return a secret of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def read_keys_file(path: Path, *, check_strength: bool = True) -> list[KeyEntry]:
    """Return the keys of the file; with none, nobody gets in. Raises `ConfigError` that names the unusable entry."""
    try:
        entries = msgspec.convert(tomllib.loads(path.read_text()), _KeysFile).keys
        _check_weights(entries)
        if check_strength:
            _check_strength(entries)
    except (OSError, ValueError) as error:  # msgspec's and tomllib's errors are ValueErrors that name the place
        raise ConfigError(f"--keys-file {path} is not usable: {error}") from error
    return entries


def _check_weights(entries: Sequence[KeyEntry]) -> None:
    weights = {entry.its_tenant: entry.weight for entry in entries}
    for entry in entries:
        if entry.weight != weights[entry.its_tenant]:
            tenant = entry.its_tenant
            raise ValueError(f"the keys of tenant '{tenant}' have different weights; give all the same weight")


def _check_strength(entries: Sequence[KeyEntry]) -> None:
    for entry in entries:
        if entry.key is not None and bits_of(entry.key) < LEAST_BITS:
            raise ValueError(
                f"the key '{entry.name}' has less than {LEAST_BITS} bits and could be guessed; replace it with "
                f"`loraplex keys revoke {entry.name}` and `loraplex keys new {entry.name}`"
            )


def write_keys_file(path: Path, entries: Sequence[KeyEntry]) -> None:
    """Replace the file by one of these keys, as digests, readable by its owner alone. A reader sees the old file or the
    new one."""
    _check_weights(entries)
    text = _HEADER + "".join(map(_table, entries)) if entries else _HEADER + "keys = []\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _table(entry: KeyEntry) -> str:
    fields = {"name": entry.name, "sha256": entry.digest, "scopes": sorted(entry.scopes)}
    defaults = KeyEntry(name="x", sha256="0" * 64)
    others = [name for name in KeyEntry.__struct_fields__ if name not in (*fields, "key")]
    fields |= {name: value for name in others if (value := getattr(entry, name)) != getattr(defaults, name)}
    return "\n[[keys]]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in fields.items())


def _toml(value: object) -> str:
    """Return a value in TOML, whose strings, lists and numbers are those of JSON here."""
    if isinstance(value, datetime):
        return value.isoformat()
    return (
        msgspec.json.encode(sorted(value) if isinstance(value, frozenset) else value)
        .decode()
        .replace("\x7f", "\\u007f")
    )
