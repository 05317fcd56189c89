"""The server as its user runs it, on a tiny model: what only whole processes show."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.records import PendingAdapter
from adapters.registry.registry import AdapterRegistry
from tests.fixtures.adapter_factory import with_peft, write_adapter
from tests.fixtures.timing import HANG_SECONDS, wait_for
from tests.fixtures.tiny_server import (
    RunningServer,
    running_server,
    sse_events,
    start_server,
    wait_until_ready,
    write_tiny_model,
)
from tests.fixtures.virtual_tokens import generated, write_virtual

VERSIONS = 8
STREAMS = 8
SWAPS = 200
ENGINE_FLAGS = (
    *("--served-model-name", "tiny-base", "--dtype", "float32", "--threads", "1"),
    *("--kv-cache-bytes", "33554432"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and adapters version-0, version-1, …, which answer differently."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for index in range(VERSIONS):
        write_adapter(
            model, folder / f"version-{index}", seed=index, r=2 + 2 * index, scale=0.3, target_modules="all-linear"
        )
    return folder


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("data"), "--model", str(tiny / "model"), *ENGINE_FLAGS) as running:
        yield running


def test_the_process_of_the_api_has_no_torch_and_is_small(server: RunningServer) -> None:
    assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{server.engine_pid()}/maps").read_text()
    assert psutil.Process(server.process.pid).memory_info().rss < 200 << 20


def test_embeddings_beside_generations_are_those_of_peft(tiny: Path, server: RunningServer) -> None:
    """By the official client, whose default is base64, of the base and of two adapters at once."""
    prompt = [5 + (7 * i) % 200 for i in range(300)]
    names = ["tiny-base", "embeds-1", "embeds-2"]
    with server.client() as client, ThreadPoolExecutor(16) as threads:
        for index in (1, 2):
            server.upload(client, f"embeds-{index}", tiny / f"version-{index}").raise_for_status()
        options = {"max_retries": 0, "timeout": HANG_SECONDS}
        official = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", **options)  # type: ignore[arg-type]
        running = [
            threads.submit(server.complete, client, name, "busy", max_tokens=64, ignore_eos=True) for name in names
        ]
        asked = {
            (name, pooling): threads.submit(
                official.embeddings.create, model=name, input=[prompt, prompt[:9]], extra_body={"pooling": pooling}
            )
            for name in names
            for pooling in ("last", "mean")
        }
        found = {key: [item.embedding for item in each.result().data] for key, each in asked.items()}
        assert all(each.result()["usage"]["completion_tokens"] == 64 for each in running)
    for index, name in enumerate(names):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny / "model")
        if index:
            model = with_peft(model, tiny / f"version-{index}")
        for place, tokens in enumerate((prompt, prompt[:9])):
            with torch.inference_mode():
                hidden = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
            for pooling, vector in (("last", hidden[-1]), ("mean", hidden.mean(0))):
                expected = (vector / vector.norm()).tolist()
                assert found[name, pooling][place] == pytest.approx(expected, abs=1e-5), (name, pooling)


def answer_of(server: RunningServer, client: httpx.Client, model: str, prompt: str = "hello") -> str:
    return str(server.complete(client, model, prompt)["choices"][0]["text"])


@pytest.mark.reliability("T50")
@pytest.mark.slow
def test_200_hot_swaps_under_8_streams(server: RunningServer, tiny: Path) -> None:
    """No request fails, every answer is one version's whole answer, and the memory is given back."""
    with server.client() as client:
        expected = {}
        for index in range(VERSIONS):
            server.upload(client, f"solo-{index}", tiny / f"version-{index}").raise_for_status()
            expected[answer_of(server, client, f"solo-{index}")] = index
            client.delete(f"/v1/adapters/solo-{index}").raise_for_status()
        assert len(expected) == VERSIONS
        before = client.get("/v1/stats").json()
        memory_before = psutil.Process(server.engine_pid()).memory_info().rss

        server.upload(client, "swapped", tiny / "version-0").raise_for_status()
        seen: list[str] = []
        stop = threading.Event()

        def stream() -> None:
            with server.client() as own:
                while not stop.is_set():
                    seen.append(answer_of(server, own, "swapped"))

        threads = [threading.Thread(target=stream) for _ in range(STREAMS)]
        for thread in threads:
            thread.start()
        for swap in range(1, SWAPS + 1):
            folder = tiny / f"version-{swap % VERSIONS}"
            assert server.upload(client, "swapped", folder, replace="true").status_code == 201
        stop.set()
        for thread in threads:
            thread.join()

        assert set(seen) <= set(expected), set(seen) - set(expected)
        assert len(set(seen)) == VERSIONS and len(seen) > SWAPS // 4
        assert expected[answer_of(server, client, "swapped")] == SWAPS % VERSIONS
        client.delete("/v1/adapters/swapped").raise_for_status()
        wait_for(lambda: client.get("/v1/stats").json()["tiers"] == before["tiers"], "freeing the versions")
        grown = psutil.Process(server.engine_pid()).memory_info().rss - memory_before
        assert grown < 64 << 20, f"{grown >> 20} MiB"


@pytest.mark.reliability("T57")
def test_replacing_a_name_changes_new_requests_and_not_running_ones(server: RunningServer, tiny: Path) -> None:
    with server.client() as client, server.client() as other:
        server.upload(client, "moving", tiny / "version-1").raise_for_status()
        solo = server.complete(client, "moving", "abc", max_tokens=400)
        body = {"model": "moving", "prompt": "abc", "temperature": 0, "max_tokens": 400, "stream": True}
        text = ""
        with client.stream("POST", "/v1/completions", json=body) as stream:
            for number, event in enumerate(sse_events(stream.iter_lines())):
                if number == 0:
                    server.upload(other, "moving", tiny / "version-2", replace="true").raise_for_status()
                    after = server.complete(other, "moving", "abc")
                if event is not None:
                    text += event["choices"][0]["text"]
                    assert event["system_fingerprint"] == solo["system_fingerprint"]
        assert text == solo["choices"][0]["text"]
        assert after["system_fingerprint"] != solo["system_fingerprint"]
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        client.delete("/v1/adapters/moving").raise_for_status()


def test_a_cartridge_is_replaced_by_another_while_a_stream_runs(
    server: RunningServer, tiny: Path, tmp_path: Path
) -> None:
    """Both give the tokens of PEFT's `generate`, and pass the self-test of uploads."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    folders = [write_virtual(model, tmp_path / str(seed), "CARTRIDGE", 20 + seed, seed) for seed in range(2)]
    prompt, options = [5, 17, 42], {"max_tokens": 60, "return_token_ids": True}
    first, second = (generated(with_peft(model, folder), prompt, 60)[0] for folder in folders)
    with server.client() as client, server.client() as other:
        upload = server.upload(client, "notes", folders[0]).json()
        assert upload["report"]["selftest"]["max_abs_logit_diff"] < 1e-3, upload
        body = {"model": "notes", "prompt": prompt, "temperature": 0, "stream": True, **options}
        tokens: list[int] = []
        with client.stream("POST", "/v1/completions", json=body) as stream:
            for number, event in enumerate(sse_events(stream.iter_lines())):
                if number == 0:
                    server.upload(other, "notes", folders[1], replace="true").raise_for_status()
                    after = other.post("/v1/completions", json={**body, "stream": False}).json()
                if event is not None:
                    tokens += event["choices"][0].get("token_ids") or []
        assert tokens == first and after["choices"][0]["token_ids"] == second
        assert after["usage"]["prompt_tokens"] == 3
        client.delete("/v1/adapters/notes").raise_for_status()


def test_adapters_are_scaled_and_composed(server: RunningServer, tiny: Path) -> None:
    with server.client() as client:
        for index in (1, 2):
            server.upload(client, f"part-{index}", tiny / f"version-{index}").raise_for_status()

        def composed(first: float, second: float) -> dict[str, Any]:
            parts = [{"name": "part-1", "scale": first}, {"name": "part-2", "scale": second}]
            return server.complete(client, "tiny-base", "hello", adapters=parts)

        texts = {scales: composed(*scales)["choices"][0]["text"] for scales in ((0, 0), (1, 0), (0, 1), (1, 1))}
        assert list(texts.values())[:3] == [answer_of(server, client, m) for m in ("tiny-base", "part-1", "part-2")]
        assert len(set(texts.values())) == 4
        off = server.complete(client, "part-1", "hello", adapter_scale=0)
        assert off["choices"][0]["text"] == texts[0, 0]
        for index in (1, 2):
            client.delete(f"/v1/adapters/part-{index}").raise_for_status()


@pytest.mark.reliability("T60")
def test_kill_9_of_the_engine_under_load(server: RunningServer, tiny: Path) -> None:
    """Every running stream gets an error frame at once; the server comes back by itself, adapters included."""
    with server.client() as client:
        server.upload(client, "survivor", tiny / "version-3").raise_for_status()
        before = answer_of(server, client, "survivor")
        frames: list[tuple[float, dict[str, Any] | None]] = []
        killed = 0.0
        started = threading.Barrier(5)

        def stream(model: str) -> None:
            body = {"model": model, "prompt": "abc", "temperature": 0, "max_tokens": 1900, "stream": True}
            with server.client() as own, own.stream("POST", "/v1/completions", json=body) as answer:
                events = sse_events(answer.iter_lines())
                next(events)
                started.wait()
                frames.extend((time.monotonic(), event) for event in events if event is None or "error" in event)

        threads = [threading.Thread(target=stream, args=(model,)) for model in ("survivor", "tiny-base") * 2]
        for thread in threads:
            thread.start()
        started.wait()
        killed = time.monotonic()
        os.kill(server.engine_pid(), signal.SIGKILL)
        unready = wait_for(lambda: client.get("/readyz").status_code == 503, "readiness turning false")
        for thread in threads:
            thread.join()
        assert len(frames) == 8 and sum(event is None for _, event in frames) == 4
        told = max(when for when, _ in frames) - killed
        assert all(event is None or event["error"]["type"] == "overloaded_error" for _, event in frames)
        assert client.get("/livez").status_code == 200
        wait_for(lambda: client.get("/readyz").status_code == 200, "the restart")
        at_once = (time.monotonic() - killed) / 5  # of a start, most of which is importing torch
        assert told < at_once and unready < at_once
        assert answer_of(server, client, "survivor") == before
        client.delete("/v1/adapters/survivor").raise_for_status()


@pytest.mark.reliability("T18")
def test_a_replacement_that_is_refused_changes_no_stream(server: RunningServer, tiny: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    broken = write_adapter(model, tmp_path / "broken", seed=0, scale=float("inf"))
    with server.client() as client, ThreadPoolExecutor(STREAMS) as threads:
        server.upload(client, "steady", tiny / "version-2").raise_for_status()
        before = answer_of(server, client, "steady")
        alone = str(server.complete(client, "steady", "hello", max_tokens=200)["choices"][0]["text"])
        asked = [threads.submit(server.complete, client, "steady", "hello", max_tokens=200) for _ in range(STREAMS)]
        for _ in range(3):
            refused = server.upload(client, "steady", broken, replace="true")
            assert refused.status_code == 422 and refused.json()["error"]["code"] == "adapter_invalid"
        assert {each.result()["choices"][0]["text"] for each in asked} == {alone}
        assert answer_of(server, client, "steady") == before
        client.delete("/v1/adapters/steady").raise_for_status()


@pytest.mark.reliability("T2")
def test_the_processes_listen_on_the_one_address_alone(server: RunningServer) -> None:
    port = int(server.url.rpartition(":")[2])
    listening = {
        tuple(connection.laddr)
        for pid in (server.process.pid, server.engine_pid())
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", port)}


@pytest.mark.slow
@pytest.mark.reliability("T67")
def test_a_life_in_development_mode_leaves_no_warning(tiny: Path, tmp_path: Path) -> None:
    """Nothing is left open or never awaited, in either process, over uploads, streams, an abort and the end."""
    log = tmp_path / "log"
    environment = {"PYTHONDEVMODE": "1", "PYTHONWARNINGS": "default::ResourceWarning,default::RuntimeWarning"}
    with log.open("w") as file:
        flags = ("--port", "0", "--model", str(tiny / "model"), *ENGINE_FLAGS)
        process = start_server(tmp_path / "data", *flags, environment=environment, log=file)
        running = RunningServer(*wait_until_ready(process))
        with running.client() as client:
            for version in (0, 1):
                running.upload(client, "lived", tiny / f"version-{version}", replace="true").raise_for_status()
                assert answer_of(running, client, "lived")
            body = {"model": "lived", "prompt": "abc", "max_tokens": 500, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(sse_events(answer.iter_lines()))
            assert client.post("/v1/chat/completions", json={"model": "nope"}).status_code == 400
            for path in ("/metrics", "/v1/stats", "/openapi.json", "/v1/adapters"):
                assert client.get(path).status_code == 200
            client.delete("/v1/adapters/lived").raise_for_status()
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG_SECONDS) == 0
        assert process.stdout is not None
        process.stdout.close()
    told = log.read_text()
    assert not re.search("ResourceWarning|never awaited|never retrieved|Traceback", told), told


@pytest.mark.reliability("T65")
def test_adapters_survive_a_restart_and_a_kill_9_of_everything(tiny: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny / "model"), *ENGINE_FLAGS)
    with running_server(tmp_path, *flags) as running, running.client() as client:
        running.upload(client, "kept", tiny / "version-4", pinned="true").raise_for_status()
        before = answer_of(running, client, "kept")
        record = client.get("/v1/adapters/kept").json()
        engine = running.engine_pid()
        running.process.kill()
        running.process.wait()
        wait_for(lambda: not psutil.pid_exists(engine), "the orphaned engine's end")
    with running_server(tmp_path, *flags) as running, running.client() as client:
        after = client.get("/v1/adapters/kept").json()
        assert {key: after[key] for key in ("version", "bytes", "created", "report")} == {
            key: record[key] for key in ("version", "bytes", "created", "report")
        }
        assert after["pinned"] and after["tier"] == "device"
        assert answer_of(running, client, "kept") == before


def data_dir_of(server: RunningServer) -> Path:
    words = psutil.Process(server.process.pid).cmdline()
    return Path(words[words.index("--data-dir") + 1])


def test_an_upload_that_is_cut_half_way_leaves_nothing(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    staging = data_dir_of(server) / "store" / ".staging"
    with server.client() as client:
        versions = _versions(client)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                b"Content-Length: 100000\r\n\r\n--b\r\n"
                b'Content-Disposition: form-data; name="name"\r\n\r\ncut\r\n--b\r\n'
            )
            wait_for(lambda: list(staging.iterdir()), "the beginning of the upload")
        wait_for(lambda: not list(staging.iterdir()), "the end of the upload")
        assert _versions(client) == versions
        assert client.get("/v1/adapters/cut").status_code == 404


def _versions(client: httpx.Client) -> list[tuple[str, str]]:
    return [(record["name"], record["version"]) for record in client.get("/v1/adapters").json()["data"]]


@pytest.mark.reliability("T64")
def test_sigterm_lets_running_requests_finish(tiny: Path, tmp_path: Path) -> None:
    flags = ("--model", str(tiny / "model"), *ENGINE_FLAGS, "--drain-timeout", str(HANG_SECONDS))
    with running_server(tmp_path, *flags) as running:
        answers: list[int] = []

        def ask() -> None:
            with running.client() as client:
                found = running.complete(client, "tiny-base", "abc", max_tokens=600)
                answers.append(found["usage"]["completion_tokens"])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        with running.client() as client:
            running_now = lambda: client.get("/v1/stats").json()["queue"]["running"]  # noqa: E731
            wait_for(lambda: running_now() + len(answers) >= 4, "four running requests")
        running.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert answers == [600] * 4
        assert running.process.wait(HANG_SECONDS) == 0


def test_a_model_that_cannot_be_served_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--model", str(tmp_path / "empty")]
    command += ["--data-dir", str(tmp_path / "data")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 2
    assert "error:" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_hub_id_is_served_out_of_the_hub_s_cache(tiny: Path, tmp_path: Path) -> None:
    """As `huggingface-cli download` leaves it: nothing is fetched."""
    snapshot = tmp_path / "hub" / "models--acme--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny / "model", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    with (
        running_server(tmp_path / "data", "--model", "acme/tiny", "--threads", "1", environment=environment) as running,
        running.client() as client,
    ):
        assert running.complete(client, "tiny", "abc")["usage"]["completion_tokens"] == 16


def test_what_a_server_had_not_fetched_is_fetched_by_the_next(tiny: Path, tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path)
    registry.remember(PendingAdapter("late", (tiny / "version-0").as_uri(), replacing=False, pinned=True, created=1))
    registry.close()
    flags = ("--model", str(tiny / "model"), "--allow-source", tiny.as_uri(), *ENGINE_FLAGS)
    with running_server(tmp_path, *flags) as running, running.client() as client:
        wait_for(lambda: client.get("/v1/adapters/late").json()["state"] == "ready", "the fetching")
        wait_for(lambda: client.get("/v1/adapters/late").json()["pinned"], "the pin")
        assert running.complete(client, "late", "abc")["usage"]["completion_tokens"] == 16


@pytest.mark.reliability("T64")
def test_a_server_ends_while_it_is_fetching(tiny: Path, tmp_path: Path) -> None:
    """And the next one would go on with it."""
    flags = ("--model", str(tiny / "model"), "--allow-source", "hf://org", *ENGINE_FLAGS)
    environment = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HUB_OFFLINE": "0"}
    with running_server(tmp_path, *flags, environment=environment) as running, running.client() as client:
        body = {"name": "late", "source": "hf://org/repo", "lazy": True}
        assert client.post("/v1/adapters", json=body).status_code == 202
    assert running.process.returncode == 0
    registry = AdapterRegistry(tmp_path)
    assert registry.pending["late"].error is None
    registry.close()


@pytest.mark.reliability("T14")
def test_a_second_server_on_the_same_data_is_refused(server: RunningServer, tiny: Path) -> None:
    data_dir = str(data_dir_of(server))
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--model", str(tiny / "model")]
    ended = subprocess.run([*command, "--data-dir", data_dir], capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 2
    assert str(server.process.pid) in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.reliability("T35")
def test_json_logs_are_one_object_a_line(tiny: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--log-format", "json"]
    command += ["--model", str(tiny / "model"), "--data-dir", str(tmp_path), *ENGINE_FLAGS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Stop the server"):
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=HANG_SECONDS)
    logged = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= set(logged[0])


def test_an_adapter_is_merged_at_start_and_answers_as_it_does_unmerged(
    server: RunningServer, tiny: Path, tmp_path: Path
) -> None:
    folder = tiny / "version-3"
    with server.client() as client:
        server.upload(client, "unmerged", folder)
        expected = answer_of(server, client, "unmerged")
    flags = ("--adapter", f"acme={folder}", "--merge", "acme", "--merge-others", "refuse")
    with (
        running_server(tmp_path, "--model", str(tiny / "model"), *ENGINE_FLAGS, *flags) as merged,
        merged.client() as client,
    ):
        assert client.get("/v1/merge").json()["state"] == "merged"
        assert answer_of(merged, client, "acme") == expected
        refused = client.post("/v1/completions", json={"model": "tiny-base", "prompt": "hello"})
        assert refused.status_code == 409 and refused.json()["error"]["code"] == "merged"
        os.kill(merged.engine_pid(), signal.SIGKILL)
        wait_for(lambda: client.get("/v1/merge").json()["state"] == "none", "the end of the engine")
        wait_for(lambda: client.get("/v1/merge").json()["state"] == "merged", "the merge of the new engine")
        assert answer_of(merged, client, "acme") == expected
