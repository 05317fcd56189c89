"""A receipt has all that determines an output, and `loraplex replay` computes the output again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from server.cli.main import app
from server.cli.replay import difference
from server.receipt_format import digest_of
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.api_server import serving
from tests.fixtures.tiny_server import BASE, RunningServer, running_server, write_tiny_model

runner = CliRunner()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("receipts")
    write_tiny_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    flags = ["--model", str(folder / "model"), "--served-model-name", BASE, "--dtype", "bfloat16"]
    for seed, name in enumerate(("one", "two")):
        flags += ["--adapter", f"{name}={write_adapter(model, folder / name, seed=seed, scale=0.3)}"]
    with running_server(folder / "data", *flags) as running:
        yield running


def replayed(server: RunningServer, folder: Path, receipt: Any) -> Any:
    (folder / "receipt.json").write_text(json.dumps(receipt))
    return runner.invoke(app, ["replay", str(folder / "receipt.json")], env={"LORAPLEX_URL": server.url})


REQUESTS: list[dict[str, Any]] = [
    {"model": BASE},
    {"model": "one", "logprobs": 2},
    {"model": "one", "temperature": 1.0, "n": 3, "logprobs": 0},
    {"model": BASE, "adapters": [{"name": "one", "scale": 0.5}, {"name": "two"}], "temperature": 0.7, "top_p": 0.9},
    {"model": "two", "prompt": ["ab", "some longer text"], "stop": ["e"], "frequency_penalty": 0.5, "logprobs": 1},
]


@pytest.mark.slow
def test_a_replay_gives_the_same_tokens_and_bits_whatever_came_between(server: RunningServer, tmp_path: Path) -> None:
    asked = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "receipt": True}
    with server.client() as client:
        responses = [client.post("/v1/completions", json={**asked, **request}).json() for request in REQUESTS]
        chat = {"model": "two", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "receipt": True}
        responses.append(client.post("/v1/chat/completions", json=chat).json())  # it samples without a seed
        client.post("/v1/adapters/one/unload").raise_for_status()
    for response in responses:
        result = replayed(server, tmp_path, response)
        assert result.exit_code == 0 and result.output.startswith("equal: "), result.output
    assert "log-probabilities, to the bit" in replayed(server, tmp_path, responses[1]["receipt"]).output


@pytest.mark.slow
def test_a_replay_says_where_an_output_differs(server: RunningServer, tmp_path: Path) -> None:
    with server.client() as client:
        asked = {"model": "one", "prompt": "Once", "max_tokens": 6, "temperature": 0, "receipt": True}
        receipt = client.post("/v1/completions", json=asked).json()["receipt"]
    receipt["outputs"][0]["token_ids"][3] += 1
    changed = replayed(server, tmp_path, receipt)
    assert changed.exit_code == 1 and "the receipt was changed" in changed.output
    receipt["digest"] = digest_of(receipt)
    differs = replayed(server, tmp_path, receipt)
    assert differs.exit_code == 1 and "choice 0 differs at token 3" in differs.output
    receipt["base"] = "another"
    receipt["digest"] = digest_of(receipt)
    assert "the server has another base" in replayed(server, tmp_path, receipt).output
    assert replayed(server, tmp_path, {"no": "receipt"}).exit_code == 1


async def test_a_receipt_names_versions_scales_sampling_and_a_seed(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        version = (await api.upload("acme")).json()["version"]
        body = (await api.complete(model="acme", adapter_scale=0.5, temperature=1, receipt=True)).json()
        receipt = body["receipt"]
        assert receipt["adapters"] == [{"name": "acme", "version": version, "scale": 0.5}]
        assert receipt["digest"] == digest_of(receipt) and receipt["base"] == api.engine.info.base_fingerprint
        assert receipt["sampling"]["seed"] is not None
        assert receipt["sampling"]["temperature"] == 1
        assert "receipt" not in (await api.complete(model="acme")).json()


@pytest.mark.parametrize("beside", [{"stream": True}, {"response_format": {"type": "json_object"}}])
async def test_what_a_receipt_cannot_hold_is_refused_by_name(tmp_path: Path, beside: dict[str, Any]) -> None:
    async with serving(tmp_path) as api:
        response = await api.complete(receipt=True, **beside)
        assert response.status_code == 400 and "receipt" in response.text


def test_differences_are_found_in_order() -> None:
    one = [{"token_ids": [1, 2], "logprobs": [-0.5, -0.25], "finish_reason": "length"}]
    assert difference(one, one) is None
    assert difference(one, [{**one[0], "token_ids": [1]}]) == "choice 0 differs at token 1: 2 in the receipt, None now"
    assert "log-probability 1: -0.25" in str(difference(one, [{**one[0], "logprobs": [-0.5, -0.26]}]))
    assert difference(one, [{**one[0], "finish_reason": "stop"}]) == "choice 0 ended by 'length', and by 'stop' now"
    assert difference(one, []) is not None
