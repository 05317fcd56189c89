"""`loraplex keys`, and what it writes."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.api.middleware.auth import KeyRing
from server.cli.main import app
from server.config import ConfigError, ServeConfig
from server.keys_file import KeyEntry, bits_of, new_secret, read_keys_file, write_keys_file
from tests.fixtures.api_server import secret


def run(file: Path, *arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments, "--keys-file", str(file)])
    assert result.exit_code == status, result.output
    return result.output


def ring(file: Path) -> KeyRing:
    return KeyRing.load(ServeConfig(keys_file=file))


def test_a_key_is_made_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    first = run(file, "new", "app").strip()
    second = run(
        file, "new", "tenant", "--scope", "infer", "--scope", "admin", "--adapter", "mine", "--days", "1"
    ).strip()
    assert first not in file.read_text() and second not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    keys = ring(file)
    one, other = keys.find(first), keys.find(second)
    assert one is not None and (one.name, one.scopes, one.tenant, one.expires) == ("app", {"infer"}, "app", None)
    assert other is not None and other.scopes == {"infer", "admin"} and other.adapters == {"mine"}
    assert other.expires is not None and 86_000 < other.expires - datetime.now(UTC).timestamp() <= 86_400
    listed = run(file, "ls")
    assert "app" in listed and "mine" in listed and "never" in listed and first not in listed
    run(file, "revoke", "app")
    keys.reload()
    assert keys.find(first) is None and keys.find(second) is not None
    run(file, "revoke", "tenant")
    keys.reload()
    assert keys.find(second) is None and bool(keys)  # nobody gets in, rather than everybody


def test_mistakes_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    run(file, "ls", status=2)
    run(file, "new", "app")
    before = file.read_bytes()
    run(file, "new", "app", status=2)
    run(file, "new", "other", "--scope", "root", status=2)
    run(file, "new", "other", "--scope", "observe", "--adapter", "mine", status=2)
    run(file, "revoke", "nobody", status=2)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["keys.toml"]


def test_an_old_file_keeps_working_and_is_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        f'[[keys]]\nname = "app"\nkey = "{secret("x")}"\nscopes = ["infer"]\nweight = 2.0\nmax_concurrent = 3\n'
        f'[[keys]]\nname = "odd \\"name\\""\nkey = "{secret("y")}"\nadapters = ["b", "a"]\ntenant = ""\n'
    )
    before = ring(file)
    assert "loraplex keys hash" in caplog.text and secret("x") not in caplog.text
    run(file, "hash")
    after = ring(file)
    assert secret("x") not in file.read_text()
    for name in ("x", "y"):
        assert before.find(secret(name)) == after.find(secret(name)) is not None


def test_a_weak_key_is_refused_with_the_command_that_replaces_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text('[[keys]]\nname = "app"\nkey = "hunter2"\n')
    with pytest.raises(ConfigError, match="loraplex keys revoke app"):
        ring(file)
    run(file, "hash", status=2)
    run(file, "revoke", "app")
    assert read_keys_file(file) == []


def test_every_field_survives_a_rewrite(tmp_path: Path) -> None:
    file, when = tmp_path / "keys.toml", datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    entry = KeyEntry(
        name='ein \x7f "\\ \u2028 Name',
        sha256="a" * 64,
        scopes=frozenset({"infer", "admin"}),
        tenant="t",
        adapters=frozenset({"x", "y"}),
        expires=when,
        weight=0.5,
        max_concurrent=1,
        requests_per_minute=2,
        tokens_per_minute=3,
        max_adapters=4,
        max_adapter_bytes=5,
    )
    write_keys_file(file, [entry])
    assert read_keys_file(file) == [entry]


def test_bits_of_secrets() -> None:
    assert bits_of(new_secret()) >= 256 and bits_of("0123456789abcdef" * 2) == 128
    for weak in ("", "hunter2", "a" * 200, "correct horse battery", "0123456789" * 3):
        assert bits_of(weak) < 128, weak
