"""vLLM's flags on the command line of `serve`: each is translated or refused by name."""

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import vllm_flags
from server.cli.main import app
from server.cli.vllm_flags import FlagRefused, translated
from server.config import ServeConfig, flag_name


def test_a_command_line_of_vllm_is_understood_and_said() -> None:
    given = (
        'org/base --enable-lora --lora-modules a=/x b=/y \'{"name": "c", "path": "/z", "base_model_name": "org/base"}\''
        " --max-loras 4 --max-lora-rank=32 --max-cpu-loras 9 --max_model_len 4k --served-model-name base"
        " --gpu-memory-utilization 0.8 --api-key secret --port 9"
    )
    arguments, notes = translated(shlex.split(given))
    assert arguments == shlex.split(
        "--model org/base --adapter a=/x --adapter b=/y --adapter c=/z --adapter-slots 4 --max-adapter-rank 32"
        " --max-model-len 4000 --served-model-name base --gpu-memory-utilization 0.8 --api-key secret --port 9"
    )
    said = [note.split(":")[0].removeprefix("vLLM's ").split()[0] for note in notes]
    assert said == [
        "--enable-lora",
        "--lora-modules",
        "--max-loras",
        "--max-lora-rank",
        "--max-cpu-loras",
        "--max-model-len",
    ]
    assert "--adapter-slots 4" in notes[2] and "secret" not in "".join(notes)


def test_the_served_name_is_vllm_s_for_a_command_line_of_vllm() -> None:
    for given in ("org/Base --enable-lora", "--model org/Base --enable-lora", "--model=org/Base --enable-lora"):
        arguments, notes = translated(given.split())
        assert arguments[-2:] == ["--served-model-name", "org/Base"] and "org/Base" in notes[-1]
    assert translated(["org/Base"]) == (["--model", "org/Base"], [])
    assert translated(["org/Base", "--enable-lora", "--served-model-name=b"]).arguments[2:] == [
        "--served-model-name",
        "b",
    ]


def test_flags_of_this_server_pass_as_they_are() -> None:
    given = shlex.split("--adapter a=b --demo --no-demo --port=1 --dtype auto --config x.yaml --cors-origin '*'")
    assert translated(given) == (given, [])


@pytest.mark.parametrize(
    ("given", "becomes"),
    [
        ("--dtype half", "--dtype float16"),
        ("-q bitsandbytes", "--quantization nf4"),
        ("--max-model-len 32K", "--max-model-len 32768"),
        ("--max-model-len -1", "--max-model-len 0"),
        ("--max-num-batched-tokens 2k", "--max-batch-tokens 2000"),
        ("--kv-cache-memory-bytes 1.5G", "--kv-cache-bytes 1073741824"),
        ("--enforce-eager", "--eager"),
        ("--scheduling-policy priority", "--scheduling-policy fair"),
        ("""--allowed-origins '["https://a", "https://b"]'""", "--cors-origin https://a --cors-origin https://b"),
        ("-tp 1 --load-format auto --kv-cache-dtype=auto", ""),
        ("--tool-call-parser hermes --enable-auto-tool-choice", ""),
        ("--trust-remote-code --enable-chunked-prefill True --generation-config vllm", ""),
    ],
)
def test_values_are_translated(given: str, becomes: str) -> None:
    arguments, notes = translated(shlex.split(given))
    assert arguments == becomes.split() and notes


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("-tp 2", "--tensor-parallel-size 2"),
        ("--quantization awq", "nf4"),
        ("--dtype float8", "float8"),
        ("--seed 0", "`seed`"),
        ("--enable-prefix-caching False", "leave the flag out"),
        ("--enable-lora=false", "leave the flag out"),
        ("--speculative-model x", "speculative"),
        ("--ssl-keyfile x", "proxy"),
        ("--data-parallel-rank 1", "one device"),
        ("--no-enable-prefix-caching", "cache_salt"),
        ("--served-model-name a b", "one name"),
        ("--lora-modules a=org/name", "--allow-source hf://org"),
        ("--lora-modules a", "name=folder"),
        ("""--lora-modules '{"name": "a", "path": "/x", "rank": 3}'""", "'rank'"),
        ("--lora-modules {", "JSON"),
        ("--allowed-origins *", "--cors-origin"),
        ("--max-loras", "needs a value"),
        ("a b", "named twice"),
    ],
)
def test_what_means_nothing_here_is_refused_by_name(given: str, says: str) -> None:
    with pytest.raises(FlagRefused) as refused:
        translated(shlex.split(given))
    assert says in str(refused.value)


def test_keys_are_not_repeated_in_a_refusal() -> None:
    with pytest.raises(FlagRefused, match="--keys-file") as refused:
        translated(["--api-key", "first-secret", "second-secret"])
    assert "secret" not in str(refused.value)


def test_rules_lead_to_flags_that_there_are() -> None:
    own = {flag_name(name) for name in ServeConfig.__dataclass_fields__}
    both = vllm_flags._RULES.keys() & vllm_flags._REFUSED.keys()
    assert not both and not vllm_flags._REFUSED.keys() & own
    for flag, rule in vllm_flags._RULES.items():
        values = {"--lora-modules": ["a=/x"], "--allowed-origins": ['["x"]']}.get(flag, ["auto"])
        try:
            flags = rule.translate(values if rule.values else []).flags
        except FlagRefused:
            continue
        assert {each for each in flags if each.startswith("--")} <= own, flag


def test_serve_says_what_it_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr("server.launch.launch", launched.append)
    runner = CliRunner()
    arguments = ["serve", str(tmp_path), "--enable-lora", "--lora-modules", "a=/x", "b=/y", "--max-loras", "3"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (config,) = launched
    assert (config.model, config.adapter, config.adapter_slots) == (str(tmp_path), ("a=/x", "b=/y"), 3)
    assert config.served_model_name == str(tmp_path)
    assert "--adapter-slots 3" in result.stderr and "adapters are always served" in result.stderr
    for refused in (["-tp", "2"], ["--chat-template", "x.jinja"], ["--no-such-flag", "1"]):
        result = runner.invoke(app, ["serve", *refused])
        assert result.exit_code == 2 and len(launched) == 1
        assert refused[0].lstrip("-")[:2] in result.output or "tensor" in result.output
