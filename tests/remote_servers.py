"""A hub and an object store on loopback, which speak the real protocols and can be told to fail."""

import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KEY_ID, SECRET, REGION = "the-key-id", "the-secret", "eu-west-1"


@dataclass
class Request:
    path: str
    headers: dict[str, str]


@dataclass
class Remote:
    """`files` by path. `faults` by the last part of a path are what happens to the next requests for it: a status,
    "truncated", "corrupt", "endless" or a URL to be sent to."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # with every file
    requests: list[Request] = field(default_factory=list)
    large: bool = True  # the hub keeps weights as large files, with a SHA-256
    token: str | None = None  # what the hub asks for

    def paths(self, last: str) -> list[str]:
        return [request.path for request in self.requests if request.path.endswith(last)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    remote: Remote

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.remote.requests.append(Request(path, {key.lower(): value for key, value in self.headers.items()}))
        faults = self.remote.faults.get(path.rpartition("/")[2], [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            self.answer(fault, b"internal: http://10.0.0.1/secret")
        elif isinstance(fault, str) and "://" in fault:
            self.answer(302, b"", location=fault)
        elif not self.may(path):
            self.answer(403, b"")
        else:
            self.serve(path, fault)

    def may(self, path: str) -> bool:
        raise NotImplementedError

    def body_of(self, path: str) -> bytes | None:
        return self.remote.files.get(path)

    def serve(self, path: str, fault: str | None) -> None:
        body = self.body_of(path)
        if body is None:
            return self.answer(404, b"")
        etag = f'"{hashlib.md5(body).hexdigest()}"'
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "endless":
            return self.answer_without_end()
        self.answer(200, body, cut=fault == "truncated", **{"etag": etag} | self.remote.headers)

    def answer(self, status: int, body: bytes, *, cut: bool = False, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"content-length": str(len(body)), "connection": "close", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = True

    def answer_without_end(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            self.close_connection = True


class _Hub(_Handler):
    def may(self, path: str) -> bool:
        wanted = self.remote.token
        return wanted is None or self.headers.get("authorization") == f"Bearer {wanted}"

    def body_of(self, path: str) -> bytes | None:
        """The description of any revision of `org/repo`, or a file of the one commit."""
        about = "/api/models/org/repo/revision/"
        if path.startswith(about):
            return (
                json.dumps(self.describe()).encode() if path.removeprefix(about) in ("main", "pr/1", COMMIT) else None
            )
        return self.remote.files.get(path.removeprefix(f"/org/repo/resolve/{COMMIT}/"))

    def describe(self) -> dict[str, object]:
        siblings = []
        for name, data in self.remote.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
            if self.remote.large and name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            else:
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(entry)
        return {"id": "org/repo", "sha": COMMIT, "private": False, "siblings": siblings}


class _S3(_Handler):
    def may(self, path: str) -> bool:
        """Whether the address is signed as Amazon's Signature Version 4 says, by the one key that there is."""
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        signature = query.pop("X-Amz-Signature", "")
        scope = f"{query.get('X-Amz-Date', '')[:8]}/{REGION}/s3/aws4_request"
        if query.get("X-Amz-Credential") != f"{KEY_ID}/{scope}":
            return False
        canonical_query = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items()))
        host = f"host:{self.headers['host']}\n"
        request = "\n".join(("GET", parts.path, canonical_query, host, "host", "UNSIGNED-PAYLOAD"))
        digest = hashlib.sha256(request.encode()).hexdigest()
        key = f"AWS4{SECRET}".encode()
        for step in scope.split("/"):
            key = hmac.digest(key, step.encode(), "sha256")
        text = "\n".join(("AWS4-HMAC-SHA256", query["X-Amz-Date"], scope, digest))
        return hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), signature)


class _PublicS3(_Handler):
    def may(self, path: str) -> bool:
        return not urlsplit(self.path).query


@contextmanager
def _running(kind: type[_Handler]) -> Iterator[Remote]:
    remote = Remote()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (kind,), {"remote": remote}))
    remote.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield remote
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub() -> AbstractContextManager[Remote]:
    """One model, `org/repo`; its branch `main` and the reference `pr/1` are the commit `COMMIT`."""
    return _running(_Hub)


def s3(*, public: bool = False) -> AbstractContextManager[Remote]:
    """Objects by /bucket/key, addressed by path as MinIO is."""
    return _running(_PublicS3 if public else _S3)


def use_hub(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub, which read its environment when it was imported, take `remote` for the hub."""
    monkeypatch.setattr(constants, "ENDPOINT", remote.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{remote.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
