"""A real Prometheus scrapes a live server: every panel draws something, and its own linter has nothing to say."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.dashboards import FOLDER
from deploy.panels import RATE
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.browser import needs
from tests.fixtures.promql import Asked, queries_of_grafana, queries_of_perses, rules
from tests.fixtures.timing import HANG_SECONDS, patience, wait_for
from tests.fixtures.tiny_server import BASE, RunningServer, running_server, write_tiny_model

pytestmark = pytest.mark.slow
PROMETHEUS, PROMTOOL = Path("/usr/bin/prometheus"), Path("/usr/bin/promtool")
SETTINGS = FOLDER / "prometheus"
NAMES = ("one", "two", "three")


@pytest.fixture(autouse=True)
def needs_prometheus() -> None:
    needs(PROMTOOL, "apt-get install prometheus")


def promtool(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [str(PROMTOOL), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=SETTINGS, timeout=HANG_SECONDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "--lint-fatal", "rules.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("test", "rules", "rules.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts_what_is_deployed(arguments: tuple[str, ...]) -> None:
    done = promtool(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_panel_and_rule_has_data_under_a_short_load(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    flags = ("--model", str(model), "--served-model-name", BASE, "--adapter-slots", "2", "--dtype", "float32")
    with running_server(tmp_path / "data", *flags) as server, server.client() as client:
        upload_adapters(server, client, tmp_path)
        with prometheus(tmp_path, server.url) as monitor:
            wanted = {*queries_of_grafana(), *queries_of_perses(), *recorded()}
            for _ in patience("data for every panel"):
                run_load(server, client, monitor)
                wanted = {asked for asked in wanted if not has_data(monitor, asked.expression)}
                if not wanted:
                    break
            assert_rules_evaluate(monitor)
        exposition = client.get("/metrics").text
    complaints = promtool("check", "metrics", stdin=exposition)
    found = (complaints.stdout + complaints.stderr).splitlines()
    assert [line for line in found if not line.startswith("vllm:")] == []  # the ecosystem's names have a colon


def upload_adapters(server: RunningServer, client: httpx.Client, tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        folder = write_adapter(tiny_llama(vocab_size=vocabulary(tmp_path)), tmp_path / name, seed=seed, r=4)
        server.upload(client, name, folder).raise_for_status()


def vocabulary(tmp_path: Path) -> int:
    return int(yaml.safe_load((tmp_path / "model" / "config.json").read_text())["vocab_size"])


def recorded() -> list[Asked]:
    return [Asked(rule["record"], rule["record"]) for rule in rules() if "record" in rule]


def run_load(server: RunningServer, client: httpx.Client, monitor: httpx.Client) -> None:
    """Three adapters in two slots, the base, a name that does not exist, and a merge."""
    for name in (BASE, *NAMES, *NAMES):
        server.complete(client, name, "A prompt that is long enough to fill some blocks of the cache.")
    assert client.post("/v1/completions", json={"model": "unknown", "prompt": "x"}).status_code == 404
    client.post("/v1/merge", json={"name": NAMES[0]}).raise_for_status()
    wait_for(lambda: has_data(monitor, "loraplex_merged_adapter_info"), "a scrape while an adapter is merged")
    client.delete("/v1/merge").raise_for_status()


@contextmanager
def prometheus(tmp_path: Path, target: str) -> Iterator[httpx.Client]:
    """Prometheus with the deployed rules and the address of a server, scraping twice a second."""
    settings: dict[str, Any] = yaml.safe_load((SETTINGS / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    settings["rule_files"] = [str(SETTINGS / "rules.yml")]
    (job,) = settings["scrape_configs"]
    del job["authorization"]
    job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    command = [
        *(
            str(PROMETHEUS),
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'series'}",
        ),
        *(f"--web.listen-address={address}", "--log.level=error"),
    ]
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=HANG_SECONDS) as client:
            wait_for(lambda: is_ready(client, process), "Prometheus's start")
            yield client
    finally:
        process.terminate()
        process.wait(HANG_SECONDS)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def is_ready(client: httpx.Client, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "Prometheus ended"
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def has_data(monitor: httpx.Client, expression: str) -> bool:
    """Ask for the last minute as a panel does. Every variable of the dashboard selects everything."""
    query = expression.replace(RATE, "10s").replace("$job", ".*").replace("$instance", ".*").replace("$adapter", ".*")
    now = float(monitor.get("/api/v1/query", params={"query": "time()"}).json()["data"]["result"][1])
    asked = {"query": query, "start": now - 60, "end": now, "step": 1}
    answer = monitor.post("/api/v1/query_range", data=asked).json()
    assert answer["status"] == "success", answer
    return any(value != "NaN" for series in answer["data"]["result"] for _, value in series["values"])


def assert_rules_evaluate(monitor: httpx.Client) -> None:
    groups = monitor.get("/api/v1/rules").json()["data"]["groups"]
    found = {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}
    assert found.keys() == {rule.get("alert") or rule["record"] for rule in rules()}
    assert set(found.values()) == {"ok"}, found
