"""The command `llm`, with the server as an extra OpenAI-compatible model."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from driver import (
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    PERSON,
    QUESTION,
    TASK,
    TEXTS,
    URL,
    WEATHER,
    call,
    report,
)

FOLDER = Path.cwd() / "llm"
EMBEDDING_MODEL = "text-embedding-3-small"  # `llm` has no embeddings of other OpenAI-compatible models
ENV = {**os.environ, "LLM_USER_PATH": str(FOLDER), "OPENAI_BASE_URL": f"{URL}/v1", "OPENAI_API_KEY": KEY}
CALL = json.dumps({"name": WEATHER["name"], "arguments": {"city": "Paris", "days": 3}})
QUESTION_WITH_CALL = f"{WEATHER['question']} Answer with this line alone: <tool_call>{CALL}</tool_call>"
COMMAND = [str(Path(sys.executable).with_name("llm"))]


def configure() -> None:
    FOLDER.mkdir(exist_ok=True)
    server = {"model_name": MODEL, "api_base": f"{URL}/v1"}
    models = [
        {"model_id": "chat", "supports_tools": True, "supports_schema": True, **server},
        {"model_id": "completion", "completion": True, **server},
    ]
    (FOLDER / "extra-openai-models.yaml").write_text(json.dumps(models))


def run(*arguments: str) -> str:
    done = subprocess.run([*COMMAND, *arguments], env=ENV, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout


def options(max_tokens: int = MAX_TOKENS) -> list[str]:
    return ["-o", "temperature", "0", "-o", "max_tokens", str(max_tokens)]


def chat() -> Any:
    return run("-m", "chat", "--no-stream", *options(), TASK["question"]).removesuffix("\n")


def stream() -> Any:
    command = [*COMMAND, "-m", "chat", *options(), TASK["question"]]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE) as process:
        pieces = list(iter(lambda: os.read(process.stdout.fileno(), 1 << 16), b""))
    deltas = [piece.decode() for piece in pieces]
    return {"deltas": [*deltas[:-1], deltas[-1].removesuffix("\n")]}


def tools() -> Any:
    """Chosen by the model itself, which is told what to write: `llm` has no way to force a call."""
    function = f"def {WEATHER['name']}(city: str, days: int) -> str:\n    {WEATHER['description']!r}\n"
    arguments = ["--functions", f"{function}    return {WEATHER['result']!r}\n", "--no-stream", *options(JSON_TOKENS)]
    answer = run("-m", "chat", *arguments, QUESTION_WITH_CALL)
    logged = json.loads(run("logs", "-n", "0", "--json"))
    made = [each for response in logged for each in response.get("tool_calls", ())]
    return {"calls": [call(each["name"], each["arguments"]) for each in made], "answer": answer.strip()}


def json_schema() -> Any:
    schema = json.dumps(PERSON["schema"])
    return json.loads(run("-m", "chat", "--schema", schema, "--no-stream", *options(JSON_TOKENS), PERSON["question"]))


def embeddings() -> Any:
    _post(f"/v1/adapters/{EMBEDDING_MODEL}/split", {"weights": {MODEL: 1}}, method="PUT")
    return [json.loads(run("embed", "-m", EMBEDDING_MODEL, "-c", text, "-f", "json")) for text in TEXTS]


def logprobs() -> Any:
    """A completion of the rendered chat, because `llm` has log-probabilities of completions alone."""
    tokens = _post("/tokenize", {"model": MODEL, "messages": QUESTION})["tokens"]
    prompt = _post("/detokenize", {"model": MODEL, "tokens": tokens})["prompt"]
    run("-m", "completion", "--no-stream", "-o", "logprobs", "1", *options(), prompt)
    (logged,) = json.loads(run("logs", "-n", "1", "--json"))
    return logged["response_json"]["choices"][0]["logprobs"]["token_logprobs"]


def _post(path: str, body: Any, method: str = "POST") -> Any:
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    request = urllib.request.Request(URL + path, data, headers, method=method)
    with urllib.request.urlopen(request) as response:
        return json.load(response)


configure()
calls_by_itself = MODEL == "smollm2-135m-instruct"
report(
    {} if calls_by_itself else {"tools": "the adapter makes no call by itself, and `llm` cannot force one"},
    chat=chat,
    stream=stream,
    **({"tools": tools} if calls_by_itself else {}),
    json_schema=json_schema,
    embeddings=embeddings,
    logprobs=logprobs,
)
