"""Sources that the operator allowed can be copied; no other path is accessed."""

import os
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterError, AdapterTooLarge, SourceNotAllowed, SourceNotFound
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.sources import NAMED_BY_OPERATOR, copy_from
from adapters.sources import file as file_source

LIMIT = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An allowed folder with one adapter in it, beside a secret folder."""
    for folder in (tmp_path / "allowed" / "one", tmp_path / "secret" / "two", tmp_path / "into"):
        folder.mkdir(parents=True)
        if folder.name != "into":
            for name in FILES:
                (folder / name).write_bytes(name.encode())
            (folder / "README.md").write_bytes(b"x")
    return tmp_path


def fetch(root: Path, source: str, max_bytes: int = LIMIT) -> None:
    copy_from(source, ["hf://org", f"file://{root}/allowed"], root / "into", max_bytes=max_bytes)


def copied(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "into").iterdir())


def test_copies_the_two_files_and_no_other(root: Path) -> None:
    fetch(root, f"file://{root}/allowed/one")
    assert copied(root) == sorted(FILES)
    assert all((root / "into" / name).read_bytes() == name.encode() for name in FILES)


def test_copies_the_tokenizer_that_is_there(root: Path) -> None:
    one = root / "allowed" / "one"
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "tokenization.py", "vocab.json"):
        (one / name).write_bytes(name.encode())
    fetch(root, f"file://{one}")
    assert copied(root) == sorted([*FILES, "chat_template.jinja", "tokenizer.json"])


def test_a_tokenizer_that_cannot_be_read_is_not_left_out(root: Path) -> None:
    beside = root / "allowed" / "one" / "tokenizer.json"
    beside.symlink_to(root / "allowed" / "absent")
    with pytest.raises(SourceNotFound):
        fetch(root, f"file://{root}/allowed/one")
    beside.unlink()
    beside.symlink_to(root / "secret" / "two" / FILES[0])
    with pytest.raises(SourceNotAllowed):
        fetch(root, f"file://{root}/allowed/one")


def test_the_files_of_a_tokenizer_are_capped_too(root: Path) -> None:
    beside = root / "allowed" / "one" / "chat_template.jinja"
    beside.write_bytes(b"x" * (LIMIT - 44))
    fetch(root, f"file://{root}/allowed/one")
    beside.write_bytes(b"x" * (LIMIT - 43))
    with pytest.raises(AdapterTooLarge):
        fetch(root, f"file://{root}/allowed/one")
    with beside.open("wb") as file:
        file.truncate(TOKENIZER_FILES[beside.name] + 1)
    with pytest.raises(AdapterTooLarge):
        fetch(root, f"file://{root}/allowed/one", 1 << 40)


def test_a_name_with_spaces_is_written_with_percent_signs(root: Path) -> None:
    (root / "allowed" / "one").rename(root / "allowed" / "a b?#c")
    fetch(root, f"file://{root}/allowed/a%20b%3F%23c")
    assert copied(root) == sorted(FILES)


def test_links_inside_the_allowed_folder_are_followed(root: Path) -> None:
    snapshot = root / "allowed" / "snapshot"
    snapshot.mkdir()
    for name in FILES:
        (snapshot / name).symlink_to(root / "allowed" / "one" / name)
    fetch(root, f"file://{root}/allowed/snapshot")
    assert copied(root) == sorted(FILES)


def test_the_allowed_folder_may_be_a_link(root: Path) -> None:
    (root / "link").symlink_to(root / "allowed")
    copy_from(f"file://{root}/allowed/one", [f"file://{root}/link"], root / "into", max_bytes=LIMIT)
    assert copied(root) == sorted(FILES)


@pytest.mark.parametrize(
    "path",
    [
        "/secret/two",
        "/secret/absent",
        "/allowed/../secret/two",
        "/allowed/%2e%2e/secret/two",
        "/allowed/one/../../secret/two",
        "/allowed-not/two",
        "/allowed/out",
        "/allowed/files-out",
        "",
        "/",
    ],
)
def test_nothing_outside_is_read(root: Path, path: str) -> None:
    (root / "allowed" / "out").symlink_to(root / "secret" / "two")
    (root / "allowed" / "files-out").mkdir()
    for name in FILES:
        (root / "allowed" / "files-out" / name).symlink_to(root / "secret" / "two" / name)
    with pytest.raises(SourceNotAllowed) as caught:
        fetch(root, f"file://{root}{path}")
    assert "secret/two" not in str(caught.value).replace(path, "")
    assert "links" in str(caught.value) and "--allow-source" in str(caught.value)
    assert copied(root) == []


@pytest.mark.reliability("T7")
@pytest.mark.parametrize("what", ["/etc/passwd", "/proc/self/environ", "/dev/zero"])
def test_no_file_of_the_system(root: Path, what: str) -> None:
    with pytest.raises(SourceNotAllowed):
        fetch(root, f"file://{what}")


@pytest.mark.reliability("T7")
@pytest.mark.parametrize(
    "source",
    [
        "http://169.254.169.254/latest",
        "https://example.com/x",
        "hf://other/repo@main",
        "hf://org",
        "s3://bucket/prefix",
        "ftp://x/y",
        "javascript:alert(1)",
        "",
        "one",
        "/etc",
        "../one",
        "~/one",
        "file:one",
        "file://host/srv/adapters",
        "file://[::1",
        "file:///x?y=1",
        "file:///x#y",
        "\\\\host\\share",
        "file:\0//x",
    ],
)
def test_other_ways_to_name_a_place_are_not_served(root: Path, source: str) -> None:
    with pytest.raises(SourceNotAllowed) as caught:
        fetch(root, source)
    assert str(root) not in str(caught.value)


def test_links_of_a_folder_that_the_operator_named_lead_anywhere(root: Path) -> None:
    snapshot = root / "snapshot"
    snapshot.mkdir()
    for name in FILES:
        (snapshot / name).symlink_to(Path("..") / "secret" / "two" / name)
    (root / "link").symlink_to(snapshot)
    copy_from(f"file://{root}/link", NAMED_BY_OPERATOR, root / "into", max_bytes=LIMIT)
    assert copied(root) == sorted(FILES)
    os.unlink(snapshot / FILES[1])
    os.mkfifo(snapshot / FILES[1])  # a folder of the operator is still only read where it has files
    with pytest.raises(SourceNotFound):
        copy_from(f"file://{root}/link", NAMED_BY_OPERATOR, root / "into", max_bytes=LIMIT)


@pytest.mark.reliability("T7")
def test_nothing_is_allowed_by_default(root: Path) -> None:
    with pytest.raises(SourceNotAllowed):
        copy_from(f"file://{root}/allowed/one", [], root / "into", max_bytes=LIMIT)


@pytest.mark.parametrize("name", ["absent", "one%00", "loop", "x" * 300, "partial", "unreadable", "pipe", "folder"])
def test_absent_files_are_not_found(root: Path, name: str) -> None:
    allowed = root / "allowed"
    (allowed / "loop").symlink_to(allowed / "loop")
    (allowed / "partial").mkdir()
    (allowed / "partial" / FILES[0]).write_bytes(b"x")
    (allowed / "pipe").mkdir()
    (allowed / "folder" / FILES[0]).mkdir(parents=True)
    (allowed / "unreadable").mkdir()
    os.mkfifo(allowed / "pipe" / FILES[0])
    with pytest.raises(SourceNotFound) as caught:
        fetch(root, f"file://{allowed}/{name}")
    assert name[:50].replace("%00", "") in str(caught.value)


@pytest.mark.parametrize(("max_bytes", "fits"), [(0, False), (43, False), (44, True), (10**9, True)])
def test_the_files_together_are_capped(root: Path, max_bytes: int, fits: bool) -> None:
    assert sum(map(len, FILES)) == 44
    source = f"file://{root}/allowed/one"
    if fits:
        fetch(root, source, max_bytes)
    else:
        with pytest.raises(AdapterTooLarge):
            fetch(root, source, max_bytes)


def test_an_endless_file_stops_at_the_cap(root: Path) -> None:
    big = root / "allowed" / "one" / FILES[1]
    with big.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(AdapterTooLarge):
        fetch(root, f"file://{root}/allowed/one")
    assert not (root / "into" / FILES[1]).exists()  # its size is known before anything is copied


@pytest.mark.reliability("T1")
def test_a_pickle_is_named_with_the_command_that_converts_it(root: Path) -> None:
    one = root / "allowed" / "one"
    (one / FILES[1]).rename(one / "adapter_model.bin")
    with pytest.raises(SourceNotFound, match=r"adapter_model\.bin.*loraplex convert"):
        fetch(root, f"file://{one}")


def test_messages_are_printable(root: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        fetch(root, "file:///a\r\nb\ud800")
    assert str(caught.value).isprintable()


def test_a_file_that_grows_while_it_is_copied_stops_at_the_cap(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "allowed" / "one" / FILES[1]
    check = file_source._check_file

    def grow_after(*arguments: Any) -> None:
        check(*arguments)
        if arguments[1] == path:
            with path.open("ab") as file:
                file.truncate(1 << 30)

    monkeypatch.setattr(file_source, "_check_file", grow_after)
    with pytest.raises(AdapterTooLarge):
        fetch(root, f"file://{root}/allowed/one")
    assert (root / "into" / FILES[1]).stat().st_size <= LIMIT


def test_a_hard_link_to_another_file_is_refused_unless_the_operator_names_the_folder(root: Path) -> None:
    """A tenant who may write into the allowed folder links a file that only the server may read."""
    place = root / "allowed" / "one" / FILES[1]
    place.unlink()
    place.hardlink_to(root / "secret" / "two" / FILES[1])
    with pytest.raises(SourceNotAllowed, match="hard links"):
        fetch(root, f"file://{root}/allowed/one")
    assert FILES[1] not in copied(root)
    copy_from(f"file://{root}/allowed/one", NAMED_BY_OPERATOR, root / "into", max_bytes=LIMIT)
    assert FILES[1] in copied(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to other users")
def test_a_file_of_another_user_is_refused(root: Path) -> None:
    os.chown(root / "allowed" / "one" / FILES[1], 4711, -1)
    with pytest.raises(SourceNotAllowed, match="another user"):
        fetch(root, f"file://{root}/allowed/one")
    os.chown(root / "allowed", 4711, -1)  # the folder's owner may
    fetch(root, f"file://{root}/allowed/one")
