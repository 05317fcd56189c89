"""Constraints in the engine: outputs follow their grammar, and other sequences do not notice."""

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from adapters.registry.store import AdapterStore
from server.api.text.grammar_worker import respond
from server.config import ServeConfig
from server.engine.build import build_engine
from server.engine.grammars import ConstraintFailed, Grammars
from server.grammar_limits import PARSER_LIMITS
from server.ipc.messages import Abort
from server.model.loading.tokenizer import describe, load_tokenizer
from server.model.sampling.allowed import AllowedTokens
from server.model.sampling.sampler import start_sampling
from server.model.sampling.token_counts import TokenCounts
from server.request import Constraint, SamplingParams
from server.sequence import Sequence
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.api_server import byte_tokenizer, fast_byte_tokenizer, ids
from tests.fixtures.engine_driver import Driver
from tests.fixtures.schemas import SCHEMAS
from tests.fixtures.timing import patience
from tests.fixtures.tiny_server import write_tiny_model

TOKENIZER = byte_tokenizer()
(EOS,) = ids(TOKENIZER, "<|end|>")
PROMPT = ids(TOKENIZER, "Say something")
BYTES = LLTokenizer("byte")
MIB = 1 << 20


def grammar(kind: str, source: Any) -> Constraint:
    text = source if isinstance(source, str) else json.dumps(source)
    made = respond({"kind": kind, "source": text, "limits": PARSER_LIMITS}, BYTES)
    return Constraint(made["text"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def driver(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Driver]:
    made = make(model, tmp_path)
    made.engine.overlap = request.param
    yield made
    made.engine.close()


def make(model: Path, data_dir: Path, **settings: Any) -> Driver:
    sizes = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 8 * MIB, "adapter_slots": 2, **settings}
    config = ServeConfig(model=str(model), data_dir=data_dir, max_step_ms=float("inf"), **sizes)
    engine, info = build_engine(config, load_tokenizer(str(model)))
    return Driver(engine, info, AdapterStore(data_dir / "store"))


def text_of(driver: Driver, seq_id: str) -> str:
    return TOKENIZER.decode(driver.tokens(seq_id), skip_special_tokens=False)


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_outputs_follow_their_schemas_and_other_rows_do_not_change(driver: Driver, model: Path, tmp_path: Path) -> None:
    """Random weights at temperature 1, in one batch with free rows and rows of an adapter."""
    digest = driver.add_adapter(write_adapter(tiny_llama(vocab_size=258), tmp_path / "a", scale=0.2))
    driver.bring_to_device(digest)
    free = [(f"free {i}", digest if i % 2 else None, {"temperature": float(i > 1), "seed": i}) for i in range(4)]
    for (number, (name, schema)), (_, version, _) in zip(enumerate(SCHEMAS.items()), free * 20, strict=False):
        params = {"temperature": 1.0, "seed": number, "max_tokens": 600, "constraint": grammar("json", schema)}
        driver.submit(name, PROMPT, version, **params)
    for seq_id, version, params in free:
        driver.submit(seq_id, PROMPT, version, max_tokens=40, **params)
    driver.run()
    for name, schema in SCHEMAS.items():
        assert driver.finish_reason(name) == "stop", (name, text_of(driver, name), driver.outputs[name][-1].error)
        found = json.loads(text_of(driver, name))
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
        checker.validate(found)
    mixed = {seq_id: driver.tokens(seq_id) for seq_id, *_ in free}
    for seq_id, version, params in free:
        driver.submit(f"alone {seq_id}", PROMPT, version, max_tokens=40, **params)
        driver.run()
    assert mixed == {seq_id: driver.tokens(f"alone {seq_id}") for seq_id, *_ in free}


@pytest.mark.parametrize(
    ("kind", "source", "outputs"),
    [
        ("regex", "[ab]{2}c", {a + b + "c" for a in "ab" for b in "ab"}),
        ("choice", ["yes", "yes indeed", 'q"u\n', "größe"], {"yes", "yes indeed", 'q"u\n', "größe"}),
        ("grammar", 'root ::= "x" | "(" ("y" | "z") ")"', {"x", "(y)", "(z)"}),
        ("grammar", 'start: "x" | "y"', {"x", "y"}),
    ],
)
def test_other_grammars(driver: Driver, kind: str, source: Any, outputs: set[str]) -> None:
    for seed in range(12):
        params = {"temperature": 20.0, "seed": seed, "max_tokens": 40, "ignore_eos": False}
        driver.submit(f"s{seed}", PROMPT, constraint=grammar(kind, source), **params)
    driver.run()
    found = {text_of(driver, f"s{seed}") for seed in range(12)}
    assert len(found) > 1 and found <= outputs


def test_the_length_ends_an_output_as_ever(driver: Driver) -> None:
    driver.submit("s", PROMPT, max_tokens=5, constraint=grammar("regex", "a{9}"))
    driver.run()
    assert (text_of(driver, "s"), driver.finish_reason("s")) == ("aaaaa", "length")


def test_preempted_sequences_go_on_where_they_were(model: Path, tmp_path: Path) -> None:
    """A cache that holds few of the sequences at once gives the outputs of one that holds all."""
    outputs = []
    for number, size in enumerate((8 * MIB, 16 * 2 * 2 * 2 * 16 * 4 * 12)):
        driver = make(model, tmp_path / str(number), kv_cache_bytes=size)
        for seed in range(6):
            params = {"temperature": 1.0, "seed": seed, "max_tokens": 60}
            driver.submit(f"s{seed}", PROMPT, constraint=grammar("regex", "([a-m]{3} ){12}"), **params)
        driver.run()
        preemptions = driver.engine.scheduler.preemptions
        assert (preemptions > 0) == (number == 1)
        outputs.append([text_of(driver, f"s{seed}") for seed in range(6)])
        driver.engine.close()
    assert outputs[0] == outputs[1]


def test_log_probabilities_are_the_model_s_own(driver: Driver) -> None:
    for seq_id, constraint in (("free", None), ("bound", grammar("regex", "q+"))):
        driver.submit(seq_id, PROMPT, max_tokens=1, logprobs=3, constraint=constraint)
    driver.run()
    (free,), (bound,) = (driver.outputs[seq_id][0].logprobs or [] for seq_id in ("free", "bound"))
    assert [token for token, _ in free.top] == [token for token, _ in bound.top]
    assert bound.rank > 1


def test_an_aborted_request_ends_before_and_after_its_first_step(driver: Driver) -> None:
    driver.submit("early", PROMPT, constraint=grammar("regex", "a{50}"), max_tokens=60)
    driver.engine.handle(Abort(["early"]))
    driver.submit("late", PROMPT, constraint=grammar("regex", "b{50}"), max_tokens=60)
    for _ in patience("its first token"):
        if "late" in driver.outputs:
            break
        driver.step()
    driver.engine.handle(Abort(["late"]))
    driver.run()
    assert [driver.finish_reason(seq_id) for seq_id in ("early", "late")] == ["abort", "abort"]


def test_an_adapter_s_own_tokenizer_names_the_tokens(driver: Driver, model: Path, tmp_path: Path) -> None:
    """Its letters are other tokens than the base's; in one step with a sequence of the base."""
    folder = write_adapter(tiny_llama(vocab_size=258), tmp_path / "a", scale=0.2)
    backend = json.loads((model / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    backend["model"]["vocab"] = {token: 255 - number for token, number in vocabulary.items() if number < 256}
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    digest = driver.add_adapter(folder, "tokenizer.json")
    driver.bring_to_device(digest)
    made = grammar("regex", "[a-z]{3} [0-9]{4}")
    driver.submit("own", PROMPT, digest, constraint=Constraint(made.grammar, digest), max_tokens=20)
    driver.submit("base", PROMPT, constraint=made, max_tokens=20)
    driver.run()
    own = Tokenizer.from_str(json.dumps(backend)).decode(driver.tokens("own"))
    assert all(re.fullmatch("[a-z]{3} [0-9]{4}", text) for text in (own, text_of(driver, "base")))
    assert not re.fullmatch("[a-z]{3} [0-9]{4}", text_of(driver, "own"))


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_grammar_that_cannot_be_used_is_refused_alone(driver: Driver) -> None:
    driver.submit("bad", PROMPT, constraint=Constraint("start: ]["))
    driver.submit("gone", PROMPT, constraint=Constraint(grammar("regex", "a").grammar, "no such version"))
    driver.submit("good", PROMPT, constraint=grammar("regex", "ab"))
    driver.run()
    assert [driver.finish_reason(seq_id) for seq_id in ("bad", "gone", "good")] == ["refused", "refused", "stop"]
    assert "grammar" in (driver.outputs["bad"][-1].error or "")


@pytest.mark.reliability("T23")
def test_a_grammar_that_exceeds_its_limits_ends_its_own_sequence(driver: Driver) -> None:
    """Every step of `((a{1,1000}){1,1000}){1,1000}` makes more states."""
    driver.submit("dear", PROMPT, constraint=Constraint("start: /((a{1,1000}){1,1000}){1,1000}/"), max_tokens=400)
    driver.submit("free", PROMPT, max_tokens=30)
    driver.run()
    assert driver.finish_reason("dear") == "error" and "grammar" in (driver.outputs["dear"][-1].error or "")
    assert len(driver.tokens("free")) == 30


def test_a_grammar_whose_masks_take_too_long_ends_its_own_sequence(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ambiguous grammars take more from token to token, within the parser's limits."""
    monkeypatch.setattr("server.engine.constraints.FREE_SECONDS", 0.001)
    monkeypatch.setattr("server.engine.constraints.MAX_SLOW_SECONDS", 0.02)
    source = 'root ::= root root root | root root | "a" | "b"'
    driver.submit("dear", PROMPT, constraint=grammar("grammar", source), max_tokens=1500)
    driver.submit("free", PROMPT, max_tokens=30)
    driver.run()
    assert driver.finish_reason("dear") == "error" and "too long" in (driver.outputs["dear"][-1].error or "")
    assert len(driver.tokens("free")) == 30


def test_a_model_without_its_tokenizer_is_told_apart() -> None:
    def backend(_: str) -> str:
        raise LookupError("the engine has no tokenizer")

    with pytest.raises(ConstraintFailed, match="no tokenizer"):
        Grammars(backend, frozenset()).parser(grammar("regex", "a"))


def test_parsers_do_not_share_their_state() -> None:
    base = describe(fast_byte_tokenizer()).backend
    reads = count()

    def backend(_: str) -> str:
        next(reads)
        return base

    grammars = Grammars(backend, frozenset({EOS}))
    first, second = (grammars.parser(grammar("regex", "ab")) for _ in range(2))
    assert first.consume_tokens(ids(TOKENIZER, "ab")) and first.is_stopped()
    assert not second.is_stopped() and next(reads) == 1


# -- ends --------------------------------------------------------------------------------------------------------------


def allowed(driver: Driver, so_far: str, source: str, **params: Any) -> set[int]:
    """The tokens that may follow an output."""
    constraints = driver.engine._constraints
    seq = Sequence("s", list(PROMPT), SamplingParams(max_tokens=50, constraint=grammar("regex", source), **params))
    request = driver.engine._constraints._build(_Request(seq.sampling))
    constraints.begin(seq, request)
    for token in ids(TOKENIZER, so_far):
        seq.token_ids.append(token)
        assert not constraints.completes(seq, token, is_last=False)
    bits = np.unpackbits(constraints.masks([seq]).masks[0], bitorder="little")
    return set(np.flatnonzero(bits).tolist())


class _Request:
    def __init__(self, sampling: SamplingParams) -> None:
        self.sampling = sampling


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """An engine of a model with an end token."""
    folder = write_tiny_model(tmp_path_factory.mktemp("ending"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": EOS}))
    made = make(folder, tmp_path_factory.mktemp("data"))
    yield made
    made.engine.close()


def test_end_tokens_may_come_when_the_grammar_accepts(ending: Driver) -> None:
    (a, b) = ids(TOKENIZER, "ab")
    assert allowed(ending, "", "a+b?") == {a}
    assert allowed(ending, "a", "a+b?") == {a, b, EOS}
    assert allowed(ending, "a", "a+b?", ignore_eos=True) == {a, b}
    assert allowed(ending, "a", "a+b?", min_tokens=2) == {a, b}
    assert allowed(ending, "aa", "a+b?", min_tokens=2, stop_token_ids=(7,)) == {a, b, 7, EOS}
    assert allowed(ending, "a", "a+b?", min_tokens=2, stop_token_ids=(7,)) == {a, b}
    assert allowed(ending, "", "a+b?", stop_token_ids=(7,)) == {a}


@pytest.mark.parametrize("params", [{}, {"ignore_eos": True}, {"min_tokens": 30}])
def test_a_complete_output_ends(ending: Driver, params: dict[str, Any]) -> None:
    """Also where the request would have it go on: nothing can follow."""
    ending.submit(f"s{params}", PROMPT, constraint=grammar("regex", "abc"), max_tokens=40, **params)
    ending.run()
    assert (text_of(ending, f"s{params}"), ending.finish_reason(f"s{params}")) == ("abc", "stop")


def test_bias_does_not_lift_a_constraint(ending: Driver) -> None:
    (x,) = ids(TOKENIZER, "x")
    params = {"logit_bias": {x: 100.0, EOS: 100.0}, "constraint": grammar("regex", "[a-c]{4}"), "max_tokens": 9}
    ending.submit("biased", PROMPT, ignore_eos=False, **params)
    ending.run()
    assert len(text_of(ending, "biased")) == 4 and set(text_of(ending, "biased")) <= set("abc")


# -- masks on the device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_changes_its_row_alone(temperature: float) -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(max_tokens=1, temperature=temperature, seed=3, logprobs=1)
    seqs = [Sequence(str(row), [1], params) for row in range(3)]
    mask = np.zeros((1, 4), np.uint8)  # shorter than the vocabulary: the rest is not allowed
    mask[0, 3] = 0b1000
    counts = TokenCounts(logits.device)
    free = start_sampling(logits, seqs, frozenset(), counts).collect()
    masked = start_sampling(logits, seqs, frozenset(), counts, None, AllowedTokens(np.array([1]), mask)).collect()
    assert masked[1].token_id == 27
    assert [masked[row] for row in (0, 2)] == [free[row] for row in (0, 2)]
    expected = logits.log_softmax(-1)[1, 27].item()
    assert masked[1].logprobs is not None and masked[1].logprobs.logprob == pytest.approx(expected, abs=1e-5)


def test_an_error_state_is_not_taken_for_an_end() -> None:
    """A matcher that has failed says that it has stopped, too."""
    matcher = LLMatcher(BYTES, grammar("regex", "ab").grammar, log_level=0)
    assert not matcher.consume_token(ord("x")) and matcher.is_stopped() and matcher.is_error()
