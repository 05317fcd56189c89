"""The start of a server: not ready before every adapter of the command line is there, and faults that are named."""

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM

from server.api.context import Startup
from server.config import ConfigError, ServeConfig, StartFailed
from server.start_checks import check_merge, check_start, named_adapters, open_registry
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.api_server import assert_error, serving
from tests.fixtures.timing import HANG_SECONDS
from tests.fixtures.tiny_server import running_server, write_tiny_model

FLAGS = ("--served-model-name", "tiny-base", "--dtype", "float32", "--threads", "1", "--kv-cache-bytes", "33554432")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two adapters that fit it, one for another base and one without a config."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    for seed, name in enumerate(("one", "two")):
        write_adapter(model, folder / name, seed=seed, target_modules="all-linear")
    write_adapter(tiny_llama(hidden_size=96), folder / "foreign", seed=1)
    shutil.copytree(folder / "one", folder / "half")
    (folder / "half" / "adapter_config.json").unlink()
    return folder


@pytest.mark.reliability("T62")
async def test_readiness_waits_for_the_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.context.startup = startup = Startup(["one", "two"])
        assert "model is loaded" in assert_error(await api.http.get("/readyz"), 503, "starting")["message"]
        startup.stage = ""
        error = assert_error(await api.http.get("/readyz"), 503, "starting")
        assert "0 of 2 adapters" in error["message"]
        assert_error(await api.http.get("/health"), 503, "starting")
        assert (await api.http.get("/livez")).status_code == 200
        assert_error(await api.chat(model="two"), 503, "adapter_loading")
        assert_error(await api.chat(model="three"), 404, "model_not_found")
        startup.adapters.clear()
        startup.stage = "the adapter 'one' is merged"
        assert "merged" in assert_error(await api.http.get("/readyz"), 503, "starting")["message"]
        startup.done = True
        assert (await api.http.get("/readyz")).status_code == 200


def _config(tmp_path: Path, **settings: object) -> ServeConfig:
    return ServeConfig(data_dir=tmp_path / "data", **settings)  # type: ignore[arg-type]


def test_every_bad_adapter_is_named_before_the_model_loads(tiny: Path, tmp_path: Path) -> None:
    adapters = (f"a={tiny}/one", f"b={tiny}/half", f"c={tiny}/nowhere")
    with pytest.raises(StartFailed) as refused:
        check_start(_config(tmp_path, adapter=adapters))
    lines = str(refused.value).splitlines()
    assert [line.strip().split(":")[0] for line in lines[1:3]] == [f"'b' ({tiny}/half)", f"'c' ({tiny}/nowhere)"]
    assert all("adapter_config.json" in line and "no file" in line for line in lines[1:3])
    assert "--adapter-errors warn" in lines[3]
    check_start(_config(tmp_path, adapter=adapters, adapter_errors="warn"))


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        (("no-folder",), "form name=folder"),
        (("a b=x",), "256 characters"),
        (("org/versions=x",), "route"),
        (("base-model=x",), "the base model's"),
        (("a=x", "b=y", "a=z"), "more than once"),
    ],
)
def test_a_bad_flag_is_named_whatever_the_errors_of_adapters_do(adapters: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        named_adapters(ServeConfig(served_model_name="base-model", adapter=adapters, adapter_errors="warn"))


def test_an_equals_sign_belongs_to_the_folder() -> None:
    assert named_adapters(ServeConfig(adapter=("Org/Name:v1=/x/r=8",))) == [("Org/Name:v1", Path("/x/r=8"))]


def test_a_merge_of_no_adapter_is_noticed_before_the_model_loads(tiny: Path, tmp_path: Path) -> None:
    registry = open_registry(_config(tmp_path))
    with pytest.raises(ConfigError, match="--merge two"):
        check_merge(_config(tmp_path, merge="two", adapter=(f"one={tiny}/one",)), registry)
    check_merge(_config(tmp_path, merge="one", adapter=(f"one={tiny}/one",)), registry)
    check_merge(_config(tmp_path, merge="two", watch_adapters=str(tiny)), registry)
    check_merge(_config(tmp_path), registry)
    registry.close()


def _command(tiny: Path, data: Path, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--model", str(tiny / "model")]
    return [*command, "--data-dir", str(data), *FLAGS, *flags]


def test_an_adapter_for_another_base_ends_the_start_and_is_named_with_its_file(tiny: Path, tmp_path: Path) -> None:
    flags = [flag for name in ("foreign", "one") for flag in ("--adapter", f"{name}={tiny}/{name}")]
    ended = subprocess.run(_command(tiny, tmp_path, *flags), capture_output=True, text=True, timeout=HANG_SECONDS)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"'foreign' ({tiny}/foreign): adapter_model.safetensors: " in ended.stderr
    assert "'one'" not in ended.stderr and "--adapter-errors warn" in ended.stderr


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    shutil.copytree(tiny / "two", folder / "Org" / "Two")
    return folder


@pytest.fixture(scope="module")
def first_ready(tiny: Path, watched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[httpx.Response]]:
    """What the first response of a ready server was, and the adapters that it had then."""
    port, answers = _free_port(), []
    stop = threading.Event()

    def poll() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while not stop.is_set():
                try:
                    answers.append(client.get("/readyz"))
                except httpx.TransportError:
                    time.sleep(0.01)
                    continue
                if answers[-1].status_code == 200:
                    answers.append(client.get("/v1/adapters"))
                    answers.append(client.get("/v1/merge"))
                    return

    flags = [flag for name in ("half", "foreign", "one") for flag in ("--adapter", f"{name}={tiny}/{name}")]
    flags += ["--adapter-errors", "warn", "--watch-adapters", str(watched), "--merge", "one", "--port", str(port)]
    thread = threading.Thread(target=poll)
    thread.start()
    data = tmp_path_factory.mktemp("data")
    try:
        with running_server(data, "--model", str(tiny / "model"), *FLAGS, *flags):
            thread.join(HANG_SECONDS)
            yield answers
    finally:
        stop.set()
        thread.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.reliability("T15")
def test_a_ready_server_has_all_adapters_and_what_failed_is_named(first_ready: list[httpx.Response]) -> None:
    *waits, ready, adapters, merged = first_ready
    assert ready.status_code == 200 and waits
    assert {answer.json()["error"]["code"] for answer in waits} == {"starting"}
    states = {body["name"]: body["state"] for body in adapters.json()["data"]}
    assert states == {"one": "ready", "Org/Two": "ready", "half": "failed", "foreign": "failed"}
    failed = {body["name"]: body["error"] for body in adapters.json()["data"]}
    assert failed["half"].startswith("adapter_config.json: found no file") and "q_proj" in failed["foreign"]
    assert merged.json()["state"] == "merged" and merged.json()["adapter"] == "one"
