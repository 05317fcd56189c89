"""From logits to tokens: distributions, penalties, seeds, log-probabilities, and rows that went bad."""

import gc
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.device import transfers as upload
from server.model.sampling import adjustments, categorical, sampler
from server.model.sampling.categorical import FEW, categorical_params, plan_categorical
from server.model.sampling.sampler import Sample, sample, start_sampling
from server.model.sampling.token_counts import IN_PROMPT, OUTPUT, TokenCounts
from server.request import SamplingParams
from server.sequence import Sequence

EOS = frozenset({2})
VOCAB = 24


def make_seq(
    seq_id: str = "s", prompt: tuple[int, ...] = (1,), output: tuple[int, ...] = (), **params: Any
) -> Sequence:
    seq = Sequence(seq_id, list(prompt), SamplingParams(**{"max_tokens": 100, **params}))
    seq.token_ids += output
    return seq


def random_logits(rows: int = 1, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def pick(logits: torch.Tensor, *seqs: Sequence) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, list(seqs), EOS)]


def expected_distribution(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """Token by token, as the parameters are defined."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[: top_k or None]
    total = sum(probs[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if kept and (mass >= top_p * total or probs[token] < min_p * probs[order[0]]):
            break
        kept.append(token)
        mass += probs[token]
    out = torch.zeros(len(probs), dtype=torch.float64)
    out[kept] = torch.tensor([probs[token] / mass for token in kept], dtype=torch.float64)
    return out


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.85},
        {"temperature": 0.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_right_frequencies(params: dict[str, Any]) -> None:
    """20,000 draws by 20,000 seeds, so that the outcome is always the same."""
    draws = 20_000
    logits = random_logits(seed=3)
    seqs = [make_seq(**params, seed=seed) for seed in range(draws)]
    counts = torch.tensor(pick(logits.expand(draws, -1), *seqs)).bincount(minlength=VOCAB).double()
    expected = expected_distribution(logits[0], **params) * draws
    assert counts[expected == 0].sum() == 0, "a token was drawn that the parameters exclude"
    likely = expected > 5
    chi_square = ((counts - expected).square() / expected)[likely].sum().item()
    degrees = int(likely.sum()) - 1
    assert chi_square <= degrees + 4 * (2 * max(degrees, 1)) ** 0.5  # four standard deviations


def test_greedy_takes_the_likeliest_whatever_else_is_asked() -> None:
    logits = random_logits(3)
    seqs = [make_seq(temperature=0.0), make_seq(temperature=0.0, top_p=0.1), make_seq(temperature=0.0, seed=7)]
    assert pick(logits, *seqs) == logits.argmax(-1).tolist()


def test_half_precision_logits_are_sampled_as_well() -> None:
    logits = random_logits(2).bfloat16()
    assert pick(logits, make_seq(temperature=0.0), make_seq(top_k=1)) == logits.float().argmax(-1).tolist()


def test_a_seeded_answer_does_not_depend_on_its_neighbours() -> None:
    logits = random_logits(8, seed=1)
    ours = make_seq("ours", temperature=0.9, top_p=0.95, seed=42)
    alone = pick(logits[3:4], ours)
    neighbours = [
        make_seq(f"n{row}", temperature=0.3 * row, top_k=row, min_p=0.01, seed=row, presence_penalty=1.0)
        for row in range(7)
    ]
    together = pick(logits, *neighbours[:3], ours, *neighbours[3:])
    assert together[3:4] == alone


def test_a_seed_gives_the_same_tokens_again_and_another_seed_gives_others() -> None:
    logits = random_logits(spread=0.1).expand(50, -1)

    def answer(seq_id: str, seed: int | None) -> list[int]:
        return pick(logits, *(make_seq(seq_id, output=(3,) * position, seed=seed) for position in range(50)))

    assert answer("a", 7) == answer("b", 7)
    assert answer("a", 7) != answer("a", 8)
    assert answer("a", None) != answer("b", None)
    assert len(set(answer("a", 7))) > 10  # every position draws anew


@pytest.mark.parametrize(
    ("params", "formula"),
    [
        ({"logit_bias": {5: 3.0, 6: -4.0}}, lambda x: {5: x[5] + 3, 6: x[6] - 4}),
        ({"presence_penalty": 1.5}, lambda x: {7: x[7] - 1.5, 8: x[8] - 1.5}),
        ({"frequency_penalty": 0.5}, lambda x: {7: x[7] - 1.5, 8: x[8] - 0.5}),
        ({"presence_penalty": 1.0, "frequency_penalty": -0.5}, lambda x: {7: x[7] + 0.5, 8: x[8] - 0.5}),
        (
            {"repetition_penalty": 1.7},
            lambda x: {t: x[t] / 1.7 if x[t] > 0 else x[t] * 1.7 for t in (3, 4, 7, 8)},
        ),
        (
            {"logit_bias": {7: 9.0}, "repetition_penalty": 2.0, "presence_penalty": 1.0},
            lambda x: {
                **{t: x[t] / 2 if x[t] > 0 else x[t] * 2 for t in (3, 4)},
                7: (x[7] + 9) / 2 - 1,
                8: (x[8] / 2 if x[8] > 0 else x[8] * 2) - 1,
            },
        ),
    ],
    ids=["bias", "presence", "frequency", "both", "repetition", "all"],
)
def test_penalties_and_bias_follow_their_formulas(params: dict[str, Any], formula: Any) -> None:
    """Prompt 3 4, answer 7 7 8 7. Penalties of the answer leave the prompt alone; repetition is over both."""
    for seed in range(20):
        logits = random_logits(seed=seed)
        adjusted = logits[0].clone()
        for token, value in formula(logits[0].tolist()).items():
            adjusted[token] = value
        greedy = make_seq(prompt=(3, 4), output=(7, 7, 8, 7), temperature=0.0, **params)
        assert pick(logits, greedy) == [int(adjusted.argmax())]
        # Drawn with the same number, the adjusted row and the row that asks for the adjustment give one token.
        for draw in range(20):
            asks = make_seq(prompt=(3, 4), output=(7, 7, 8, 7), seed=draw, **params)
            plain = make_seq(prompt=(3, 4), output=(7, 7, 8, 7), seed=draw)
            assert pick(logits, asks) == pick(adjusted[None], plain)


def test_the_logits_of_the_step_are_not_changed() -> None:
    logits = random_logits(2)
    before = logits.clone()
    pick(logits, make_seq(logit_bias={1: 50.0}, min_tokens=5, temperature=0.0), make_seq(temperature=0.0))
    assert torch.equal(logits, before)


def test_until_min_tokens_nothing_ends_the_answer() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 9], logits[0, 4] = 50, 40, 30
    params = {"min_tokens": 3, "stop_token_ids": (9,), "temperature": 0.0}
    assert pick(logits, make_seq(output=(5, 5), **params)) == [4]
    assert pick(logits, make_seq(output=(5, 5, 5), **params)) == [2]
    for seed in range(50):
        assert pick(logits, make_seq(output=(), **{**params, "temperature": 1.0, "seed": seed})) == [4]


def test_logprobs_are_those_of_the_untouched_distribution() -> None:
    logits = random_logits(3, seed=5)
    seqs = [
        make_seq(logprobs=4, temperature=0.0),
        make_seq(logprobs=0, temperature=0.3, top_k=2, logit_bias={11: 100.0}, presence_penalty=2.0),
        make_seq(temperature=0.0),
    ]
    greedy, biased, unasked = sample(logits, seqs, EOS)
    expected = logits.log_softmax(-1)
    assert greedy.logprobs is not None and biased.logprobs is not None
    assert greedy.logprobs.logprob == pytest.approx(expected[0].max().item(), abs=1e-6)
    assert greedy.logprobs.rank == 1
    values, indices = expected[0].topk(4)
    assert [token for token, _ in greedy.logprobs.top] == indices.tolist()
    assert [value for _, value in greedy.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert biased.token_id == 11
    assert biased.logprobs.logprob == pytest.approx(expected[1, 11].item(), abs=1e-6)
    assert biased.logprobs.rank == 1 + int((expected[1] > expected[1, 11]).sum())
    assert biased.logprobs.top == []
    assert unasked.logprobs is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("whole_row", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_the_others_alone(
    bad: float, whole_row: bool, temperature: float
) -> None:
    logits = random_logits(3)
    good = [make_seq("a", temperature=temperature, seed=1), make_seq("c", temperature=temperature, seed=2, logprobs=1)]
    alone = [sample(logits[row : row + 1], [seq], EOS)[0] for row, seq in zip((0, 2), good, strict=True)]
    logits[1, slice(None) if whole_row else 5] = bad
    first, broken, last = sample(logits, [good[0], make_seq("b", temperature=temperature, logprobs=2), good[1]], EOS)
    assert broken == Sample(-1)
    assert (first.token_id, last.token_id) == (alone[0].token_id, alone[1].token_id)
    assert last.logprobs is not None and alone[1].logprobs is not None
    assert last.logprobs.logprob == pytest.approx(alone[1].logprobs.logprob, abs=1e-6)


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    """Logits divided by it overflow; the likeliest token is still the answer."""
    for seed in range(20):
        logits = random_logits(seed=seed)
        for temperature in (1e-6, 1e-38, 5e-324):
            assert pick(logits, make_seq(temperature=temperature, seed=seed)) == logits.argmax(-1).tolist()


def test_draws_beyond_the_last_kept_token_are_impossible() -> None:
    """A number next to 1 rounds to 1 in float32, past the end of the cumulative distribution."""
    logits = torch.zeros(5000, VOCAB)
    logits[:, 0] = 20.0
    tokens = pick(logits, *(make_seq(seed=seed, top_k=2) for seed in range(5000)))
    assert set(tokens) <= {0, 1}


LARGE = [{}, {"top_k": 7}, {"top_k": 2000}, {"top_p": 0.3}, {"top_p": 0.999}, {"min_p": 0.5}, {"min_p": 1e-4}]


def test_probabilities_are_added_as_integers() -> None:
    """On a GPU, the order of a float sum depends on the number of rows, and for one row on chance."""

    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::cumsum", "aten::sum"):
                summed.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    summed: list[torch.dtype] = []
    seqs = [
        make_seq(temperature=1.0, **params)
        for params in ({}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 2000, "min_p": 0.1})
    ]
    with Sums():
        sample(random_logits(len(seqs)), seqs, EOS)
    assert summed and set(summed) <= {torch.int64, torch.bool}


def test_each_way_of_drawing_gives_the_token_that_sorting_the_vocabulary_gives() -> None:
    """On a CPU few candidates are tried first; top-p 0.999 and min-p 1e-4 keep more of this vocabulary than those."""
    logits = torch.randn(1, 4 * FEW, generator=torch.Generator().manual_seed(0)).expand(200, -1)
    assert ((logits[0].softmax(-1).sort().values.cumsum(-1)) > 1e-3).sum() > FEW
    for params in LARGE[1:]:
        seqs = [make_seq(**params, seed=seed) for seed in range(200)]
        drawn = []
        for on_cpu in (True, False):
            arrays, *counts = plan_categorical(seqs, 4 * FEW, on_cpu)
            drawn.append(
                categorical.sample_categorical(
                    logits, categorical_params([torch.from_numpy(array) for array in arrays], *counts)
                )
            )
        assert torch.equal(*drawn), params


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_on_nothing_yet_changes_nothing(penalty: str) -> None:
    logits = random_logits()
    assert pick(logits, make_seq(temperature=0.0, **{penalty: 1.0})) == [int(logits[0].argmax())]


@pytest.mark.parametrize("greedy", [False, True])
def test_a_row_draws_the_same_beside_rows_that_are_drawn_in_other_ways(greedy: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(LARGE), 4 * FEW, generator=generator)
    for seed in range(20):
        seqs = [make_seq(**params, seed=seed + 100 * row) for row, params in enumerate(LARGE)]
        seqs += [make_seq(temperature=0.0)] * greedy
        rows = torch.cat([logits, logits[:1]])[: len(seqs)]
        alone = [pick(rows[row : row + 1], seq)[0] for row, seq in enumerate(seqs)]
        assert pick(rows, *seqs) == alone
        assert pick(rows.flip(0), *reversed(seqs)) == alone[::-1]


def test_parameters_go_to_the_device_in_one_copy_and_results_come_back_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[str] = []
    up, down = upload.upload, sampler.download
    monkeypatch.setattr(upload, "upload", lambda *given: (copies.append("up"), up(*given))[1])
    monkeypatch.setattr(sampler, "download", lambda tensor: (copies.append("down"), down(tensor))[1])
    everything = make_seq(
        prompt=(3, 4), output=(5,), top_p=0.9, logprobs=3, min_tokens=9, logit_bias={1: 2.0}, presence_penalty=1.0,
        repetition_penalty=1.3,
    )  # fmt: skip
    assert (
        len(sample(random_logits(3), [everything, make_seq(top_k=3), make_seq(temperature=0.0)], EOS, [24, 20, 24]))
        == 3
    )
    assert copies == ["up", "down"]
    copies.clear()
    pick(random_logits(), make_seq(temperature=0.0))
    assert copies == ["down"]


# -- counts that stay on the device ------------------------------------------------------------------------------------

PENALTIES = {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.6, "presence_penalty": 0.9}


def next_token(logits: torch.Tensor, seq: Sequence, counts: TokenCounts) -> int:
    (found,) = start_sampling(logits, [seq], EOS, counts).collect()
    return found.token_id


@pytest.mark.parametrize("native", [True, False])
def test_counts_that_were_added_to_are_those_of_the_tokens(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(adjustments, "why_unavailable", lambda _: "torch computes")
    counts, seq = TokenCounts(torch.device("cpu")), make_seq(prompt=(1, 5, 5, 9), **PENALTIES)
    for step in range(40):
        logits = random_logits(seed=step)
        seen = next_token(logits, seq, counts)
        assert seen == pick(logits, seq)[0]  # counted anew
        seq.token_ids.append(seen)


def test_a_step_that_is_computed_again_counts_once() -> None:
    counts, seq = TokenCounts(torch.device("cpu")), make_seq(prompt=(1, 5), **PENALTIES)
    for _ in range(3):
        next_token(random_logits(), seq, counts)  # the token is thrown away
    assert counts.table[0].sum() == OUTPUT + 2 * IN_PROMPT
    seq.token_ids.append(7)
    next_token(random_logits(seed=1), seq, counts)
    assert counts.table[0].sum() == 2 * OUTPUT + 2 * IN_PROMPT


def test_rows_of_ended_sequences_are_used_again() -> None:
    counts = TokenCounts(torch.device("cpu"))
    for _ in range(20):
        seqs = [make_seq(prompt=(3, 4), output=(5,), **PENALTIES) for _ in range(3)]
        start_sampling(random_logits(3), seqs, EOS, counts).collect()
        del seqs
        gc.collect()
    assert len(counts.table) == 4


def test_a_larger_vocabulary_widens_the_table_and_keeps_the_counts() -> None:
    counts, seq = TokenCounts(torch.device("cpu")), make_seq(prompt=(1, 5), **PENALTIES)
    seq.token_ids.append(next_token(random_logits(), seq, counts))
    before = counts.table[0].clone()
    next_token(torch.nn.functional.pad(random_logits(), (0, 6), value=-50.0), seq, counts)
    assert counts.table.shape[1] == VOCAB + 6
    assert (counts.table[0, :VOCAB] - before).sum() == OUTPUT


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.1, "top_k": 12},
    ],
)
def test_processed_logprobs_are_those_of_the_distribution_that_is_sampled_from(params: dict[str, Any]) -> None:
    logits = random_logits()
    bias = {3: 2.0, 7: -1.0}
    seq = make_seq(logprobs=20, processed_logprobs=True, logit_bias=bias, **params)
    changed = logits.clone()
    for token, value in bias.items():
        changed[0, token] += value
    expected = expected_distribution(changed[0], **params).log()
    # Beside rows that are sampled and scored in other ways.
    found = sample(logits.expand(3, -1), [make_seq(temperature=0.0), seq, make_seq(logprobs=1)], EOS)[1].logprobs
    assert found is not None
    for token, value in found.top:
        assert value == pytest.approx(expected[token].item(), abs=1e-5)
    assert sum(value > -torch.inf for _, value in found.top) == min(int((expected > -torch.inf).sum()), 20)


def test_raw_logprobs_stay_raw_beside_processed_ones() -> None:
    logits = random_logits()
    raw, processed = (make_seq(temperature=0.5, seed=1, logprobs=3, processed_logprobs=each) for each in (False, True))
    together = sample(logits.expand(2, -1), [raw, processed], EOS)
    assert together[0] == sample(logits, [raw], EOS)[0]
    assert together[0].logprobs != together[1].logprobs and together[0].token_id == together[1].token_id


def test_processed_logprobs_of_a_greedy_row_have_no_temperature() -> None:
    logits = random_logits()
    (found,) = sample(logits, [make_seq(temperature=0.0, logprobs=2, processed_logprobs=True)], EOS)
    assert found.logprobs is not None
    assert found.logprobs.logprob == pytest.approx(logits[0].log_softmax(-1).max().item(), abs=1e-6)
