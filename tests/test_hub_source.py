"""Sources on a hub, served by a test server with its protocol."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub import constants

from adapters.errors import AdapterError, AdapterTooLarge, SourceNotAllowed, SourceNotFound, SourceUnavailable
from adapters.registry import store
from adapters.sources import check_allow_source, check_source, copy_from, download, hub, redirects
from tests.fixtures import remote_servers
from tests.fixtures.remote_servers import COMMIT, Remote

CONFIG, WEIGHTS = store.FILES
FILES = {CONFIG: b"{}" * 50, WEIGHTS: b"\1weights" * 1000}
LIMIT = 10_000
ALLOWED = ("file:///srv", "hf://org")


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    with remote_servers.hub() as remote:
        remote_servers.use_hub(remote, monkeypatch)
        monkeypatch.setattr(download, "WAITS_SECONDS", (0.0, 0.0))
        remote.files = {**FILES, "README.md": b"x", "pytorch_model.bin": b"x" * LIMIT}
        yield remote


def fetch(into: Path, source: str = "hf://org/repo@main", max_bytes: int = LIMIT) -> str:
    return copy_from(source, ALLOWED, into, max_bytes=max_bytes)


def found(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_branch_becomes_the_commit_that_it_is(remote: Remote, tmp_path: Path) -> None:
    assert fetch(tmp_path) == f"hf://org/repo@{COMMIT}"
    assert found(tmp_path) == FILES
    assert len(remote.requests) == 3  # nothing else is asked for


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_revisions(remote: Remote, tmp_path: Path, revision: str) -> None:
    assert fetch(tmp_path, f"hf://org/repo{revision}") == f"hf://org/repo@{COMMIT}"


def test_a_folder_of_the_repository(remote: Remote, tmp_path: Path) -> None:
    remote.files = {f"a b/c+d/{name}": data for name, data in FILES.items()}
    assert fetch(tmp_path, "hf://org/repo@main/a b/c+d/") == f"hf://org/repo@{COMMIT}/a b/c+d"
    assert found(tmp_path) == FILES


@pytest.mark.parametrize("large", [True, False])
def test_files_are_checked_against_both_kinds_of_digest(remote: Remote, tmp_path: Path, large: bool) -> None:
    remote.large = large
    remote.faults = {WEIGHTS: ["corrupt"], CONFIG: ["corrupt"]}
    fetch(tmp_path)
    assert found(tmp_path) == FILES and len(remote.requests) == 5
    remote.faults = {WEIGHTS: ["corrupt"] * 9}
    with pytest.raises(SourceUnavailable):
        fetch(tmp_path)


@pytest.mark.parametrize("fault", [500, 503, 429, "truncated"])
@pytest.mark.parametrize("what", ["main", CONFIG, WEIGHTS])
def test_a_passing_failure_is_tried_again_a_few_times(
    remote: Remote, tmp_path: Path, fault: int | str, what: str
) -> None:
    remote.faults = {what: [fault, fault]}
    fetch(tmp_path)
    assert found(tmp_path) == FILES
    remote.faults, remote.requests = {what: [fault] * 99}, []
    with pytest.raises(SourceUnavailable) as caught:
        fetch(tmp_path)
    assert len(remote.paths(what)) == 3
    assert "127.0.0.1" not in str(caught.value) and "10.0.0.1" not in str(caught.value)


def test_an_unreachable_hub(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(SourceUnavailable) as caught:
        fetch(tmp_path)
    assert caught.value.status == 503 and "127.0.0.1" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceUnavailable, match="HF_HUB_OFFLINE"):
        fetch(tmp_path)


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize("what", ["main", WEIGHTS])
def test_absent_or_hidden_repositories_are_not_found_at_once(
    remote: Remote, tmp_path: Path, what: str, status: int
) -> None:
    remote.faults = {what: [status]}
    with pytest.raises(SourceNotFound):
        fetch(tmp_path)
    assert len(remote.paths(what)) == 1


def test_a_repository_without_the_files(remote: Remote, tmp_path: Path) -> None:
    del remote.files[CONFIG]
    with pytest.raises(SourceNotFound):
        fetch(tmp_path)
    with pytest.raises(SourceNotFound):
        fetch(tmp_path, "hf://org/repo@absent")
    assert found(tmp_path) == {}


def test_a_repository_with_a_pickle_alone(remote: Remote, tmp_path: Path) -> None:
    remote.files["adapter_model.bin"] = remote.files.pop(WEIGHTS)
    with pytest.raises(SourceNotFound, match=r"adapter_model\.bin.*loraplex convert"):
        fetch(tmp_path)


def test_sizes_are_checked_before_and_during_the_download(remote: Remote, tmp_path: Path) -> None:
    size = sum(map(len, FILES.values()))
    fetch(tmp_path, max_bytes=size)
    remote.requests = []
    with pytest.raises(AdapterTooLarge):
        fetch(tmp_path, max_bytes=size - 1)
    assert len(remote.requests) == 1
    remote.faults = {CONFIG: ["endless"]}
    with pytest.raises(AdapterTooLarge):
        fetch(tmp_path)
    assert (tmp_path / CONFIG).stat().st_size <= LIMIT


def test_the_description_is_bounded_and_valid(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.faults = {"main": ["endless"]}
    with pytest.raises(SourceUnavailable):
        fetch(tmp_path)
    remote.faults = {"main": ["corrupt"]}
    with pytest.raises(SourceUnavailable, match="cannot be parsed"):
        fetch(tmp_path)


def test_the_token_reaches_the_hub_and_no_other_host(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    remote.token = "hf_secret"
    with remote_servers.hub() as elsewhere:
        elsewhere.files = remote.files
        elsewhere_url = f"{elsewhere.url}/org/repo/resolve/{COMMIT}/{WEIGHTS}"
        remote.faults = {WEIGHTS: [elsewhere_url]}
        fetch(tmp_path)
        assert found(tmp_path) == FILES
        assert [request.headers.get("authorization") for request in elsewhere.requests] == [None]
    assert {request.headers.get("authorization") for request in remote.requests} == {"Bearer hf_secret"}
    monkeypatch.setenv("HF_TOKEN", "another")
    with pytest.raises(SourceNotFound) as caught:
        fetch(tmp_path)
    assert "another" not in str(caught.value)


def test_the_environment_says_where_the_hub_is(remote: Remote, tmp_path: Path) -> None:
    """The hub's address as huggingface_hub reads it, in a process of its own."""
    remote.token = "hf_secret"
    script = (
        "import sys; from pathlib import Path; from adapters.sources import copy_from\n"
        "print(copy_from('hf://org/repo@main', ['hf://org'], Path(sys.argv[1]), max_bytes=10000))"
    )
    environment = {**os.environ, "HF_ENDPOINT": remote.url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"hf://org/repo@{COMMIT}" and found(tmp_path) == FILES
    assert "hf_secret" not in done.stderr


@pytest.mark.reliability("T7")
@pytest.mark.parametrize(
    "source",
    [
        "hf://org-evil/repo@main",
        "hf://orgevil/repo@main",
        "hf://or/repo@main",
        "hf://ORG/repo@main",
        "hf://other/org/repo@main",
        "hf://org",
        "hf://org/../other/repo@main",
        "hf://org/..@main",
        "hf://other/repo@main/org",
        "hf://user:password@org/repo@main",
        "hf://org/repo@main?x=y",
        "hf://org/repo@main#x",
        "hf://org//repo@main",
        "hf://org/repo@main/../x",
        "hf://org/repo@main/a\\b",
        "hf:org/repo",
        "hf://",
        "hf:///",
        "HF://org/repo",
    ],
)
def test_nothing_else_is_allowed(remote: Remote, tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceNotAllowed):
        fetch(tmp_path, source)
    assert remote.requests == [] and found(tmp_path) == {}


@pytest.mark.parametrize("revision", ["..%2F..%2Fother%2Frepo", "%2e%2e", "a%00b"])
def test_a_revision_is_never_a_path(remote: Remote, tmp_path: Path, revision: str) -> None:
    with pytest.raises(AdapterError) as caught:
        fetch(tmp_path, f"hf://org/repo@{revision}")
    assert caught.value.status in (403, 404)
    assert all(request.path.startswith("/api/models/org/repo/revision/") for request in remote.requests)


def test_one_repository_may_be_all_that_is_allowed() -> None:
    check_source("hf://org/repo@main", ["hf://org/repo"])
    for source in ("hf://org/repo2@main", "hf://org/rep@main"):
        with pytest.raises(SourceNotAllowed):
            check_source(source, ["hf://org/repo"])


@pytest.mark.parametrize("entry", ["hf://", "hf://org/repo@main", "hf://org/repo/folder", "hf:org"])
def test_entries_that_allow_nothing_are_refused(entry: str) -> None:
    with pytest.raises(SourceNotAllowed):
        hub.roots([entry])


def test_stopping_ends_the_download(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "WAITS_SECONDS", (3600.0,))
    stop = threading.Event()
    stop.set()
    remote.faults = {"main": [500]}
    for _ in range(2):  # while waiting to try again, and while a file arrives
        with pytest.raises(SourceUnavailable, match="any more"):
            copy_from("hf://org/repo@main", ALLOWED, tmp_path, max_bytes=LIMIT, stop=stop)


def test_optional_files_come_along_within_their_own_bounds(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "TOKENIZER_FILES", {"tokenizer.json": 10, "chat_template.jinja": 10})
    remote.files["tokenizer.json"] = b"x" * 10
    fetch(tmp_path)
    assert found(tmp_path) == {**FILES, "tokenizer.json": b"x" * 10}
    remote.files["tokenizer.json"] += b"x"
    with pytest.raises(AdapterTooLarge):
        fetch(tmp_path)


@pytest.mark.parametrize("revision", ["refs%2Fpr%2F1", "pr%2F1", "refs%2FPR%2F1"])
def test_a_pull_request_needs_an_entry_of_its_own(remote: Remote, tmp_path: Path, revision: str) -> None:
    """Anyone may open one in a repository of an organisation that is allowed."""
    source = f"hf://org/repo@{revision}"
    with pytest.raises(SourceNotAllowed, match="pull request"):
        fetch(tmp_path, source)
    assert not remote.requests
    others = (*ALLOWED, "hf://org/repo@refs%2Fpr%2F2", "hf://org/other@refs%2Fpr%2F1")
    with pytest.raises(SourceNotAllowed, match="pull request"):
        check_source(source, others)
    check_source(source, [*others, "hf://org/repo@refs%2Fpr%2F1"])
    with pytest.raises(SourceNotAllowed):
        check_source("hf://org/repo@main", ["hf://org/repo@refs%2Fpr%2F1"])


def test_a_pull_request_that_is_allowed_is_fetched(remote: Remote, tmp_path: Path) -> None:
    allowed = ["hf://org/repo@pr%2F1"]
    assert copy_from("hf://org/repo@pr%2F1", allowed, tmp_path, max_bytes=LIMIT) == f"hf://org/repo@{COMMIT}"


@pytest.mark.reliability("T7")
def test_a_redirect_to_another_host_is_not_followed(remote: Remote, tmp_path: Path) -> None:
    """`localhost` is another name than the hub's, and could be a machine of this network."""
    with remote_servers.hub() as elsewhere:
        elsewhere.files = remote.files
        target = f"{elsewhere.url.replace('127.0.0.1', 'localhost')}/org/repo/resolve/{COMMIT}/{WEIGHTS}"
        remote.faults = {WEIGHTS: [target]}
        with pytest.raises(SourceUnavailable, match="not allowed"):
            fetch(tmp_path)
        assert not elsewhere.requests
        remote.faults = {WEIGHTS: [target]}
        copy_from("hf://org/repo@main", [*ALLOWED, "https://localhost"], tmp_path, max_bytes=LIMIT)
        assert len(elsewhere.requests) == 1 and found(tmp_path) == FILES


@pytest.mark.parametrize(
    ("url", "addresses", "allowed"),
    [
        ("https://huggingface.co/x", [], True),
        ("https://cdn-lfs.huggingface.co/x", ["1.1.1.1"], True),
        ("https://cas-bridge.xethub.hf.co/x", ["1.1.1.1"], True),
        ("https://cas-bridge.xethub.hf.co/x", ["1.1.1.1", "10.0.0.1"], False),
        ("https://evil.hf.co/x", ["169.254.169.254"], False),
        ("https://evil.hf.co/x", ["::1"], False),
        ("https://evil.hf.co/x", ["fd00::1"], False),
        ("https://evilhf.co/x", ["1.1.1.1"], False),
        ("https://169.254.169.254/latest", ["169.254.169.254"], False),
        ("http://cdn-lfs.huggingface.co/x", ["1.1.1.1"], False),
        ("https://mirror.example/x", ["10.0.0.1"], True),
    ],
)
def test_hosts_of_redirects(monkeypatch: pytest.MonkeyPatch, url: str, addresses: list[str], allowed: bool) -> None:
    places = [(0, 0, 0, "", (address, 0)) for address in addresses]
    monkeypatch.setattr(redirects.socket, "getaddrinfo", lambda *_, **__: places)
    check = redirects.Redirects("https://huggingface.co", ["mirror.example"]).check
    if allowed:
        check(httpx.Request("GET", url))
    else:
        with pytest.raises(redirects.RedirectNotAllowed):
            check(httpx.Request("GET", url))


@pytest.mark.parametrize(
    "entry", ["https://", "https://host/path", "https://user@host", "https://host:1", "http://host"]
)
def test_entries_for_redirects_name_a_host(entry: str) -> None:
    check_allow_source("https://cdn.example")
    with pytest.raises(SourceNotAllowed):
        check_allow_source(entry)
