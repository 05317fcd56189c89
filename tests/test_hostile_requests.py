"""Uploads and requests that would run code, reach the network or read the clock, if anything in them were trusted."""

import ast
import hmac
import io
import json
import os
import pickle
import socket
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from server.keys_file import digest_of
from tests.fixtures.api_server import adapter_files, assert_error, last_prompt, secret, serving
from tests.test_auth import ring

ROOT = Path(__file__).parent.parent


class _Canary:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._path,)


def pickles(canary: Path) -> dict[str, bytes]:
    """What torch and pickle load, in all disguises in which it may come as weights."""
    plain = pickle.dumps(_Canary(canary))
    saved, expanded = io.BytesIO(), io.BytesIO()
    torch.save({"x": _Canary(canary)}, saved)
    torch.save({"x": torch.zeros(1).expand(1 << 40)}, expanded)  # 1 kB that claims 4 TiB
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    tensors = struct.pack("<Q", len(header)) + header + bytes(8)
    return {
        "pickle": plain,
        **{f"protocol {n}": pickle.dumps(_Canary(canary), n) for n in range(5)},
        "torch": saved.getvalue(),
        "stride 0": expanded.getvalue(),
        "deflate bomb": _zipped(bytes(64 << 20)),
        "pickle behind tensors": tensors + plain,
        "zip behind tensors": tensors + saved.getvalue(),
        "pickle as header": struct.pack("<Q", len(plain)) + plain,
    }


def _zipped(content: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", content)
    return data.getvalue()


@pytest.mark.reliability("T1")
async def test_pickles_in_disguise_are_refused_and_never_run(tmp_path: Path) -> None:
    canary, config = tmp_path / "canary", adapter_files()[CONFIG_FILE]
    async with serving(tmp_path / "server") as api:
        for name, data in pickles(canary).items():
            files = {CONFIG_FILE: (CONFIG_FILE, config), WEIGHTS_FILE: (WEIGHTS_FILE, data)}
            answer = await api.http.post("/v1/adapters", data={"name": "bad"}, files=files)
            assert_error(answer, 422, "adapter_invalid", sent=name)
            for other in ("adapter_model.bin", "adapter_model.pt", "weights.pkl"):
                files = {CONFIG_FILE: (CONFIG_FILE, config), other: (other, data)}
                answer = await api.http.post("/v1/adapters", data={"name": "bad"}, files=files)
                assert 400 <= answer.status_code < 500, other
        assert not canary.exists()
        assert len(api.context.registry) == 0
    pickle.loads(pickles(canary)["pickle"])
    assert canary.exists(), "a canary that is unpickled shows"


@pytest.mark.reliability("T4")
async def test_template_syntax_in_a_request_is_text(tmp_path: Path) -> None:
    hostile = ["{{ 7 * 7 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__ }}", "{# #}", "{%- raw -%}"]
    async with serving(tmp_path) as api:
        for text in hostile:
            assert (await api.chat(text)).status_code == 200
            assert text in last_prompt(api)
            answer = await api.chat(messages=[{"role": text, "content": "hi"}])
            assert answer.status_code == 400 or text in last_prompt(api)
        for field in ("chat_template", "chat_template_url"):
            answer = await api.chat(**{field: "{{ 7 * 7 }}"})
            assert answer.status_code == 400 or field in answer.headers["x-loraplex-ignored"]
        assert_error(await api.chat(chat_template="{{ 7 * 7 }}"), 400)


@pytest.mark.reliability("T7")
async def test_no_address_in_a_request_is_connected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: reached.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **_: reached.append(asked))
    addresses = ("http://169.254.169.254/latest", "file:///etc/passwd", "s3://bucket/key", "hf://org/repo", "org/repo")
    config = json.loads(adapter_files()[CONFIG_FILE])
    async with serving(tmp_path) as api:
        for number, address in enumerate(addresses):
            for key in ("base_model_name_or_path", "revision", "auto_mapping", "megatron_core", "modules_to_save"):
                files = {
                    CONFIG_FILE: (CONFIG_FILE, json.dumps(config | {key: address}).encode()),
                    WEIGHTS_FILE: (WEIGHTS_FILE, adapter_files()[WEIGHTS_FILE]),
                }
                answer = await api.http.post(
                    "/v1/adapters", data={"name": f"a{number}", "replace": "true"}, files=files
                )
                assert answer.status_code in (200, 201, 422), key
            assert_error(await api.chat(model=address), 404, "model_not_found", sent=address)
            assert_error(await api.http.post("/v1/adapters", json={"name": "x", "source": address}), 403, sent=address)
            image = [{"type": "image_url", "image_url": {"url": address}}]
            assert (await api.chat(messages=[{"role": "user", "content": image}])).status_code == 400
        assert reached == []


@pytest.mark.reliability("T33")
def test_a_secret_is_compared_with_every_key_as_a_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, the last and no key take the same comparisons, of digests whose bytes nobody can choose."""
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    keys = ring(tmp_path)
    monkeypatch.setattr(hmac, "compare_digest", counting)
    known = [secret(name) for name in ("infer", "admin", "observe", "tenant", "nobody")]
    counts = []
    for given in known:
        compared.clear()
        keys.find(given)
        counts.append(len(compared))
        assert all(digest == digest_of(given) and len(stored) == 64 for stored, digest in compared)
    assert len(set(counts)) == 1 and counts[0] >= 4


# Where the wall clock is read: moments that are shown or stored, and the ages of files. Durations are monotonic.
CLOCKS = ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow")
WALL_CLOCK = {
    "adapters/registry/db.py": "names a damaged database",
    "adapters/registry/rebuild.py": "stored moments",
    "adapters/registry/registry.py": "stored moments",
    "server/api/adapters/fetching.py": "stored moments",
    "server/api/adapters/scrub.py": "stored moments of checks",
    "server/api/adapters/watcher.py": "stored moments",
    "server/api/context.py": "the start, as shown",
    "server/api/trace.py": "the start of a trace, as shown",
    "server/history.py": "the times of samples, as shown",
    "server/api/usage.py": "the days of usage, as shown",
    "server/usage.py": "the days of usage",
    "server/api/inference/generation.py": "`created` of responses",
    "server/api/middleware/auth.py": "the expiry of keys",
    "server/api/text/template_worker.py": "`strftime_now` of templates",
    "server/audit.py": "the time of a line",
    "server/cli/keys.py": "the expiry of keys",
    "server/ipc/socket_folder.py": "the age of files",
    "server/metrics.py": "a timestamp that vLLM's metric has",
    "server/model/loading/nf4_cache.py": "the age of files",
    "server/serve.py": "stored moments",
}


@pytest.mark.reliability("T66")
def test_no_duration_is_of_the_wall_clock() -> None:
    found = set()
    for path in [*ROOT.glob("adapters/**/*.py"), *ROOT.glob("server/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in CLOCKS:
                found.add(str(path.relative_to(ROOT)))
    assert found == WALL_CLOCK.keys()
