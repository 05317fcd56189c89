"""vLLM's flags on the command line of `loraplex serve`: each is translated, or refused by name with what to do instead.

Flags that both servers have with one meaning pass as they are.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from server.config import HINTS, flag_name

_BOOLEANS = ("true", "false")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)")
_DECIMAL, _BINARY = {"k": 3, "m": 6, "g": 9, "t": 12}, {"K": 10, "M": 20, "G": 30, "T": 40}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-q": "--quantization",
    "-O": "--compilation-config",
}


class FlagRefused(Exception):
    """A flag of vLLM that has no counterpart; the message names it and says what to do instead."""


class Translated(NamedTuple):
    """Arguments of `loraplex serve`, and a line for each flag that they take the place of."""

    arguments: list[str]
    notes: list[str]


class _Meaning(NamedTuple):
    """The meaning of a flag here: flags of this server, none if it asks for what is so anyway, and a note."""

    flags: list[str]
    note: str = ""


class _Rule(NamedTuple):
    """How a flag is translated. `values` is the number of its values: none, one, or any ("+")."""

    values: str
    translate: Callable[[list[str]], _Meaning]


def translated(arguments: Sequence[str]) -> Translated:
    """Translate a command line. Raises `FlagRefused`."""
    found, todo = Translated([], []), list(arguments)
    models: list[str] = []
    while todo:
        flag, given = _split(todo.pop(0))
        if not flag.startswith("-"):
            models.append(flag)
        elif flag in _RULES:
            values = [given] if given is not None else _take(todo, _RULES[flag].values)
            _translate(flag, values, found)
        elif instead := _refusal(flag):
            raise FlagRefused(f"vLLM's {flag} is not supported: {instead}")
        else:
            found.arguments.append(flag if given is None else f"{flag}={given}")
            if given is None and flag in _WITH_VALUE and todo:
                found.arguments.append(todo.pop(0))
    return _with_model(found, models)


def _refusal(flag: str) -> str | None:
    """Return what to do instead of a flag of vLLM that has no counterpart; None for other flags."""
    return _REFUSED.get(flag) or next((instead for head, instead in _FAMILIES.items() if flag.startswith(head)), None)


def _split(argument: str) -> tuple[str, str | None]:
    """Return a flag as this server spells it, and the value behind "=" if there is one."""
    if not argument.startswith("-"):
        return argument, None
    flag, equals, value = argument.partition("=")
    name = _SHORT.get(flag, flag.replace("_", "-"))
    return name, value if equals else None


def _take(todo: list[str], count: str) -> list[str]:
    """Remove and return the values that follow a flag."""
    taken: list[str] = []
    if not count and todo and todo[0].lower() in _BOOLEANS:
        return [todo.pop(0)]
    while todo and count and not re.match(r"--?[A-Za-z]", todo[0]):
        taken.append(todo.pop(0))
        if count == "1":
            break
    return taken


def _translate(flag: str, values: list[str], found: Translated) -> None:
    rule, written = _RULES[flag], flag if flag == "--api-key" else " ".join([flag, *values])
    if rule.values and not values:
        raise FlagRefused(f"{flag} needs a value")
    if not rule.values and values and values[0].lower() != "true":
        raise FlagRefused(f"vLLM's {written} is not supported: leave the flag out, or see `loraplex serve --help`")
    try:
        meaning = rule.translate(values)
    except FlagRefused as refused:
        raise FlagRefused(f"vLLM's {written} is not supported: {refused}") from None
    found.arguments.extend(meaning.flags)
    if meaning.flags != [flag, *values]:
        found.notes.append(f"vLLM's {written}: {meaning.note or ' '.join(meaning.flags)}")


def _with_model(found: Translated, models: list[str]) -> Translated:
    """Add the model, which vLLM names without a flag and serves under this name."""
    if len(models) > 1:
        raise FlagRefused(f"the model is named twice: {models[0]} and {models[1]}")
    arguments = [*(part for model in models for part in ("--model", model)), *found.arguments]
    model = _value(arguments, "--model")
    if found.notes and model is not None and _value(arguments, "--served-model-name") is None:
        arguments += ["--served-model-name", model]
        found.notes.append(f"the model's name in the API is {model}, as in vLLM; --served-model-name changes it")
    return Translated(arguments, found.notes)


def _value(arguments: list[str], flag: str) -> str | None:
    """Return the value of a flag, written after it or behind "="."""
    after = (value for name, value in pairwise(arguments) if name == flag)
    behind = (each.partition("=")[2] for each in arguments if each.startswith(f"{flag}="))
    return next(after, next(behind, None))


# -- rules -------------------------------------------------------------------------------------------------------------


def _renamed(flag: str, *, number: bool = False) -> _Rule:
    return _Rule("1", lambda values: _Meaning([flag, _number(values[0]) if number else values[0]]))


def _so_anyway(note: str, values: str = "") -> _Rule:
    return _Rule(values, lambda _: _Meaning([], note))


def _only(accepted: Sequence[str], instead: str) -> _Rule:
    """Accept the values that ask for what is so anyway."""

    def translate(values: list[str]) -> _Meaning:
        if values[0] not in accepted:
            raise FlagRefused(instead)
        return _Meaning([], "so it is")

    return _Rule("1", translate)


def _one_of(flag: str, meanings: dict[str, str], instead: str) -> _Rule:
    """Translate the values of a flag; those of this server stay."""

    def translate(values: list[str]) -> _Meaning:
        if values[0] not in meanings:
            raise FlagRefused(instead)
        return _Meaning([flag, meanings[values[0]]])

    return _Rule("1", translate)


def _single(flag: str, instead: str) -> _Rule:
    def translate(values: list[str]) -> _Meaning:
        if len(values) > 1:
            raise FlagRefused(instead)
        return _Meaning([flag, values[0]])

    return _Rule("+", translate)


def _number(text: str) -> str:
    """Return a number as digits: vLLM writes 32k for 32,000 and 32K for 32,768."""
    found = _NUMBER.fullmatch(text)
    if found is None:
        return text
    digits, unit = found.groups()
    return str(int(float(digits) * 10 ** _DECIMAL.get(unit, 0)) << _BINARY.get(unit, 0))


def _length(values: list[str]) -> _Meaning:
    return _Meaning(["--max-model-len", "0" if values[0] in ("auto", "-1") else _number(values[0])])


def _adapters(values: list[str]) -> _Meaning:
    return _Meaning([part for value in values for part in ("--adapter", _adapter(value))])


def _adapter(value: str) -> str:
    """Return an adapter as name=folder; vLLM also takes a JSON object."""
    name, _, path = value.partition("=")
    if value.lstrip().startswith("{"):
        try:
            given = json.loads(value)
        except ValueError as error:
            raise FlagRefused(f"the value is not valid JSON: {error}") from None
        if unknown := sorted(given.keys() - {"name", "path", "base_model_name"}):
            raise FlagRefused(f"the key '{unknown[0]}' means nothing here")
        name, path = str(given.get("name", "")), str(given.get("path", ""))
    if not name or not path:
        raise FlagRefused('write name=folder or {"name": …, "path": folder}')
    if _HUB_ID.fullmatch(path) and not Path(path).exists():
        org = path.partition("/")[0]
        raise FlagRefused(
            f"'{path}' is no folder; for the hub's repository, start with --allow-source hf://{org} and register "
            f"hf://{path} with POST /v1/adapters"
        )
    return f"{name}={path}"


def _origins(values: list[str]) -> _Meaning:
    try:
        origins = json.loads(values[0])
    except ValueError:
        origins = None
    if not isinstance(origins, list):
        raise FlagRefused("write a JSON list of origins, or --cors-origin for each")
    return _Meaning([part for origin in origins for part in ("--cors-origin", str(origin))])


_ONE_DEVICE = "a server uses one device; start one for each, behind a router"
_RULES: dict[str, _Rule] = {
    "--enable-lora": _so_anyway("adapters are always served"),
    "--enable-lora-bias": _so_anyway("lora_bias is always served"),
    "--enable-prefix-caching": _so_anyway("it is always on"),
    "--enable-chunked-prefill": _so_anyway("it is always on"),
    "--enable-auto-tool-choice": _so_anyway("it is always on"),
    "--enable-prompt-tokens-details": _so_anyway("they are always in the usage"),
    "--enable-request-id-headers": _so_anyway("x-request-id is always sent"),
    "--disable-log-requests": _so_anyway("requests are not logged"),
    "--no-enable-log-requests": _so_anyway("requests are not logged"),
    "--disable-log-stats": _so_anyway("statistics are not logged; /metrics has them"),
    "--disable-fastapi-docs": _so_anyway("there are no such pages"),
    "--async-scheduling": _so_anyway("steps are launched ahead"),
    "--use-v2-block-manager": _so_anyway("there is one block manager"),
    "--disable-custom-all-reduce": _so_anyway("a server uses one device"),
    "--trust-remote-code": _so_anyway("code of a model is never run; a model that needs it is refused"),
    "--guided-decoding-backend": _so_anyway("grammars are llguidance's", "1"),
    "--tool-call-parser": _so_anyway("the chat template decides, or the adapter's default `tool_format`", "1"),
    "--reasoning-parser": _so_anyway("the chat template decides", "1"),
    "--swap-space": _so_anyway("preempted sequences are computed again", "1"),
    "--lora-extra-vocab-size": _so_anyway("adapters have their vocabularies in any size", "1"),
    "--max-cpu-loras": _so_anyway("host memory is bounded by --adapter-host-bytes, whatever the number is", "1"),
    "--max-loras": _renamed("--adapter-slots"),
    "--max-lora-rank": _renamed("--max-adapter-rank"),
    "--max-num-batched-tokens": _renamed("--max-batch-tokens", number=True),
    "--kv-cache-memory-bytes": _renamed("--kv-cache-bytes", number=True),
    "--max-model-len": _Rule("1", _length),
    "--enforce-eager": _Rule("", lambda _: _Meaning(["--eager"])),
    "--lora-modules": _Rule("+", _adapters),
    "--allowed-origins": _Rule("1", _origins),
    "--served-model-name": _single("--served-model-name", "the base model has one name"),
    "--api-key": _single("--api-key", "write several keys into --keys-file, with `loraplex keys new`"),
    "--dtype": _one_of(
        "--dtype",
        {
            **{name: name for name in ("auto", "float32", "bfloat16", "float16")},
            "half": "float16",
            "float": "float32",
        },
        "use auto, float32, bfloat16 or float16",
    ),
    "--quantization": _one_of(
        "--quantization", {"none": "none", "nf4": "nf4", "bitsandbytes": "nf4"}, "use none, or nf4 (bitsandbytes)"
    ),
    "--scheduling-policy": _one_of(
        "--scheduling-policy",
        {"fair": "fair", "fcfs": "fcfs", "priority": "fair"},
        "use fair, which has priorities, or fcfs",
    ),
    "--tensor-parallel-size": _only(["1"], _ONE_DEVICE),
    "--pipeline-parallel-size": _only(["1"], _ONE_DEVICE),
    "--data-parallel-size": _only(["1"], _ONE_DEVICE),
    "--api-server-count": _only(["1"], "one process serves the API"),
    "--load-format": _only(["auto", "safetensors", "bitsandbytes"], "weights are read from safetensors or .gguf"),
    "--kv-cache-dtype": _only(["auto"], "the KV cache has the precision of the model"),
    "--lora-dtype": _only(["auto"], "adapters have the precision of the model"),
    "--tokenizer-mode": _only(["auto", "hf"], "the model's tokenizer.json is used"),
    "--cpu-offload-gb": _only(["0"], "the base model stays on the device; --quantization nf4 makes it smaller"),
    "--preemption-mode": _only(["recompute"], "preempted sequences are computed again"),
    "--num-scheduler-steps": _only(["1"], "steps are launched ahead, one at a time"),
    "--block-size": _only(["16"], "KV blocks have 16 tokens"),
    "--runner": _only(["auto", "generate"], "embeddings and scores are served beside generations"),
    "--task": _only(["auto", "generate"], "embeddings and scores are served beside generations"),
    "--generation-config": _only(["vllm"], "defaults are those of the API; `loraplex adapters set` has an adapter's"),
    "--model-impl": _only(["auto", "transformers"], "transformers' classes are used"),
}
_PROXY = "put a proxy in front of the server"
_HUB = "download the model and give its folder"
_REFUSED = {
    "--no-enable-lora": "adapters are always served",
    "--no-enable-prefix-caching": "the prefix cache is always on; `cache_salt` keeps a request's own",
    "--no-enable-chunked-prefill": "long prompts are always cut; see --max-batch-tokens and --max-step-ms",
    "--enable-log-requests": "requests are not logged",
    "--enable-sleep-mode": "stop the server instead",
    "--enable-expert-parallel": _ONE_DEVICE,
    "--fully-sharded-loras": _ONE_DEVICE,
    "--distributed-executor-backend": _ONE_DEVICE,
    "--kv-transfer-config": _ONE_DEVICE,
    "--revision": _HUB,
    "--code-revision": _HUB,
    "--tokenizer-revision": _HUB,
    "--tokenizer": "the model's own tokenizer is used",
    "--hf-overrides": "change the model's config.json",
    "--rope-scaling": "change the model's config.json",
    "--rope-theta": "change the model's config.json",
    "--hf-token": "set HF_TOKEN",
    "--download-dir": "set HF_HOME",
    "--chat-template": "set one for an adapter: `loraplex adapters set NAME --chat-template FILE`",
    "--override-generation-config": "set defaults of an adapter: `loraplex adapters set NAME --default FIELD=VALUE`",
    "--default-chat-template-kwargs": "set them for an adapter: `loraplex adapters set NAME --default FIELD=VALUE`",
    "--seed": "send `seed` with requests",
    "--return-tokens-as-token-ids": "send `return_tokens_as_token_ids` with requests",
    "--enable-force-include-usage": "send `stream_options` with requests",
    "--max-logprobs": "20 is the maximum",
    "--num-gpu-blocks-override": "use --kv-cache-bytes",
    "--compilation-config": "decode steps run as CUDA graphs unless --eager is set",
    "--cuda-graph-sizes": "decode steps run as CUDA graphs unless --eager is set",
    "--cudagraph-capture-sizes": "decode steps run as CUDA graphs unless --eager is set",
    "--max-seq-len-to-capture": "decode steps run as CUDA graphs unless --eager is set",
    "--ngram-prompt-lookup-max": "there is no speculative decoding",
    "--num-speculative-tokens": "there is no speculative decoding",
    "--limit-mm-per-prompt": "models are served with text alone",
    "--default-mm-loras": "models are served with text alone",
    "--long-lora-scaling-factors": "an adapter has the context of the model",
    "--disable-sliding-window": "the model's own attention is computed",
    "--long-prefill-token-threshold": "see --max-batch-tokens and --max-step-ms",
    "--max-num-partial-prefills": "see --max-batch-tokens and --max-step-ms",
    "--root-path": _PROXY,
    "--middleware": _PROXY,
    "--uds": "use --host and --port",
    "--allow-credentials": "see --cors-origin",
    "--allowed-methods": "see --cors-origin",
    "--allowed-headers": "see --cors-origin",
    "--uvicorn-log-level": "see --log-format",
    "--otlp-traces-endpoint": "there are metrics at /metrics, and no traces",
}
# By the beginning of the flag.
_FAMILIES = {
    "--spec": "there is no speculative decoding",
    "--data-parallel": _ONE_DEVICE,
    "--decode-context-parallel": _ONE_DEVICE,
    "--mm-": "models are served with text alone",
    "--ssl-": _PROXY,
    "--compilation-config.": "decode steps run as CUDA graphs unless --eager is set",
    "--structured-outputs-config": "grammars are llguidance's",
    "--override-": "see /v1/embeddings for pooling, and `loraplex adapters set` for defaults",
    "--enable-prompt-adapter": "prompt tuning is served like any adapter; see --adapter",
    "--max-prompt-adapter": "prompt tuning is served like any adapter; see --adapter",
    "--qlora-adapter": "name the adapter with --adapter name=folder, and use --quantization nf4",
}
_WITH_VALUE = {flag_name(name) for name, hint in HINTS.items() if hint is not bool} | {"--config"}
