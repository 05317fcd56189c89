"""Sources in buckets, served by a test server with S3's protocol that verifies signatures."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterTooLarge, SourceNotAllowed, SourceNotFound, SourceUnavailable
from adapters.registry import store
from adapters.sources import check_source, copy_from, download, s3
from tests.fixtures import remote_servers
from tests.fixtures.remote_servers import KEY_ID, REGION, SECRET, Remote

CONFIG, WEIGHTS = store.FILES
FILES = {CONFIG: b"{}" * 50, WEIGHTS: b"\1weights" * 1000}
LIMIT = 10_000
ALLOWED = ("hf://org", "s3://bucket/adapters")
SOURCE = "s3://bucket/adapters/acme"


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    with remote_servers.s3() as remote:
        environment = {
            "AWS_ENDPOINT_URL": remote.url,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
        }
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr(download, "WAITS_SECONDS", (0.0, 0.0))
        remote.files = {f"/bucket/adapters/acme/{name}": data for name, data in FILES.items()}
        yield remote


def fetch(into: Path, source: str = SOURCE, max_bytes: int = LIMIT) -> str:
    return copy_from(source, ALLOWED, into, max_bytes=max_bytes)


def found(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_files_of_a_prefix(remote: Remote, tmp_path: Path) -> None:
    assert fetch(tmp_path) == SOURCE
    assert found(tmp_path) == FILES
    asked = [request.path.rpartition("/")[2] for request in remote.requests]
    assert asked == [*store.FILES, *store.TOKENIZER_FILES]


def test_keys_with_signs_in_them(remote: Remote, tmp_path: Path) -> None:
    key = "a b+c=d@e,f:g&h$i;j'k(l)!m_n.o"
    remote.files = {f"/bucket/adapters/{key}/{name}": data for name, data in FILES.items()}
    fetch(tmp_path, f"s3://bucket/adapters/{key}/")
    assert found(tmp_path) == FILES


def test_a_public_bucket_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with remote_servers.s3(public=True) as public:
        public.files = {f"/bucket/adapters/acme/{name}": data for name, data in FILES.items()}
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", public.url)
        monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
        fetch(tmp_path)
    assert found(tmp_path) == FILES


def test_a_wrong_key_finds_nothing_and_is_not_revealed(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    with caplog.at_level("INFO", "adapters"), pytest.raises(SourceNotFound) as caught:
        fetch(tmp_path)
    for secret in ("another-secret", KEY_ID, "127.0.0.1", "Signature"):
        assert secret not in str(caught.value) + caplog.text
    assert found(tmp_path) == {}


@pytest.mark.parametrize("fault", [500, 503, "truncated", "corrupt"])
@pytest.mark.parametrize("what", [CONFIG, WEIGHTS])
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


@pytest.mark.parametrize(
    "headers",
    [
        {"etag": '"0123456789abcdef0123456789abcdef-2"'},
        {"etag": '"0123456789abcdef0123456789abcdef"', "x-amz-server-side-encryption": "aws:kms"},
    ],
)
def test_an_etag_that_is_no_digest_is_not_taken_for_one(
    remote: Remote, tmp_path: Path, headers: dict[str, str]
) -> None:
    remote.headers = headers
    fetch(tmp_path)
    assert found(tmp_path) == FILES


def test_the_etag_of_an_object_that_s3_encrypts_is_its_digest(remote: Remote, tmp_path: Path) -> None:
    remote.headers = {"x-amz-server-side-encryption": "AES256"}
    remote.faults = {WEIGHTS: ["corrupt"] * 9}
    with pytest.raises(SourceUnavailable):
        fetch(tmp_path)


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_prefix_without_the_files(remote: Remote, tmp_path: Path, missing: str) -> None:
    del remote.files[f"/bucket/adapters/acme/{missing}"]
    with pytest.raises(SourceNotFound):
        fetch(tmp_path)


def test_an_unreachable_store(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(SourceUnavailable) as caught:
        fetch(tmp_path)
    assert "127.0.0.1" not in str(caught.value)


def test_it_is_not_sent_elsewhere(remote: Remote, tmp_path: Path) -> None:
    with remote_servers.s3(public=True) as elsewhere:
        remote.faults = {CONFIG: [f"{elsewhere.url}/bucket/adapters/acme/{CONFIG}"]}
        with pytest.raises(SourceUnavailable):
            fetch(tmp_path)
        assert elsewhere.requests == []


def test_sizes_are_checked_before_and_during_the_download(remote: Remote, tmp_path: Path) -> None:
    size = sum(map(len, FILES.values()))
    fetch(tmp_path, max_bytes=size)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterTooLarge):
        fetch(tmp_path, max_bytes=size - 1)
    assert not (tmp_path / WEIGHTS).exists()
    remote.faults = {WEIGHTS: ["endless"]}
    with pytest.raises(AdapterTooLarge):
        fetch(tmp_path)
    assert (tmp_path / WEIGHTS).stat().st_size <= LIMIT


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/adapters-evil/acme",
        "s3://bucket/adapter",
        "s3://bucket",
        "s3://bucket-evil/adapters/acme",
        "s3://other/bucket/adapters/acme",
        "s3://bucket/adapters/../secret",
        "s3://bucket/adapters/%2e%2e/secret",
        "s3://bucket/adapters//acme",
        "s3://bucket/adapters/acme?versionId=1",
        "s3://bucket/adapters/acme#x",
        "s3://user:password@bucket/adapters/acme",
        "s3://BUCKET/adapters/acme",
        "s3://",
        "S3://bucket/adapters/acme",
    ],
)
def test_nothing_else_is_allowed(remote: Remote, tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceNotAllowed):
        fetch(tmp_path, source)
    assert remote.requests == [] and found(tmp_path) == {}


def test_a_bucket_may_be_allowed_as_a_whole() -> None:
    check_source("s3://bucket/a", ["s3://bucket"])
    check_source("s3://bucket/a", ["s3://bucket/"])


def test_optional_files_come_along(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "TOKENIZER_FILES", {"tokenizer.json": 10, "chat_template.jinja": 10})
    remote.files["/bucket/adapters/acme/tokenizer.json"] = b"x" * 10
    fetch(tmp_path)
    assert found(tmp_path) == {**FILES, "tokenizer.json": b"x" * 10}
