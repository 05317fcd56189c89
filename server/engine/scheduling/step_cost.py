"""The token budget of a step: as much prefill as fits into a target duration while sequences decode. Uses neither
torch nor a clock.

A step gives every running stream one token, so its duration is the gap between two tokens of each. A fixed number of
tokens makes that gap as long as a full chunk of prefill takes. Here the chunk follows from measured costs. (Bounding
the prefill that is computed beside decodes is the stall-free schedule of Sarathi-Serve: Agrawal et al., OSDI 2024,
whose budget is a number of tokens that is profiled once.)
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from server.sequence import ScheduledBatch, Sequence

MIN_CHUNK = 16  # tokens of prefill that a step computes whatever they cost
GRAIN = 8  # chunks are multiples of it: half a block, since on a slow machine a whole one is a third of the target
DEFAULT_SECONDS = {"cpu": 0.15, "cuda": 0.1}  # `--max-step-ms 0`
DECODE_SHARE = 0.5  # of the chosen target: slower decode steps raise it, so that prefill keeps half of the time

_KEPT = 0.9  # of the weight of earlier steps of the same kind: the last 10 steps count
_TRUSTED = 8  # number of steps of a kind after which a measurement is compared with its prediction
_OUTLIER = 2.0  # a measurement counts as at most this many times its prediction, and at least that part of it
_GROWTH = 2.0  # a chunk is at most this many times the largest one that was lately computed beside decodes
_SWEEPS = 4  # per measured step; the fit goes on from the last one's

_Terms = tuple[float, float, float, float]


class StepCost:
    """The seconds of a step as a linear function of prefill tokens, a constant, decode rows, and pairs of a prefill
    token and a token that it attends to.

    The coefficients are those of an exponentially weighted least-squares fit of relative errors, and not negative.
    Steps with and without prefill are weighted separately, so that a long time of one kind does not erase what was
    learned from the other.
    """

    def __init__(self) -> None:
        self.coefficients = [0.0] * 4  # in the order in which a step is explained while too few were measured
        self._with_prefill = _Moments()
        self._without = _Moments()

    def predict(self, rows: int, tokens: int = 0, pairs: float = 0.0) -> float:
        return self._seconds((float(tokens), 1.0, float(rows), pairs))

    def record(self, rows: int, tokens: int, pairs: float, seconds: float) -> None:
        """Take in the measured duration of a step."""
        terms = (float(tokens), 1.0, float(rows), pairs)
        moments = self._with_prefill if tokens else self._without
        expected = self._seconds(terms) if moments.count >= _TRUSTED else seconds
        if expected > 0:
            moments.add(terms, min(max(seconds, expected / _OUTLIER), expected * _OUTLIER), expected)
            self._fit()

    def without_prefill(self, rows: int) -> float:
        """Return the seconds of a step of `rows` decode rows alone; 0 until enough of them were measured."""
        return self.predict(rows) if self._without.count >= _TRUSTED else 0.0

    def per_token(self, context: int) -> float:
        """Return the seconds that a prefill token behind `context` tokens adds."""
        return self.coefficients[0] + self.coefficients[3] * context

    def tokens_within(self, seconds: float, rows: int, context: int) -> float:
        """Return how many prefill tokens behind `context` tokens fit into `seconds` beside `rows` decode rows."""
        left = seconds - self.predict(rows)
        if left <= 0:
            return 0.0
        linear, square = self.per_token(context), self.coefficients[3] / 2
        slope = linear + math.sqrt(linear * linear + 4 * square * left)
        return 2 * left / slope if slope > 0 else math.inf

    def _seconds(self, terms: _Terms) -> float:
        return sum(map(float.__mul__, self.coefficients, terms))

    def _fit(self) -> None:
        """Approach the best coefficients one after the other, from where they are."""
        found = self.coefficients
        both = [
            [a + b for a, b in zip(*rows, strict=True)]
            for rows in zip(self._with_prefill.products, self._without.products, strict=True)
        ]
        sums = [a + b for a, b in zip(self._with_prefill.sums, self._without.sums, strict=True)]
        for _ in range(_SWEEPS):
            for i, row in enumerate(both):
                if row[i] > 0:
                    others = sum(map(float.__mul__, row, found)) - row[i] * found[i]
                    found[i] = max(0.0, (sums[i] - others) / row[i])


class _Moments:
    """The weighted sums of one kind of step that a least-squares fit needs."""

    def __init__(self) -> None:
        self.count = 0
        self.products = [[0.0] * 4 for _ in range(4)]
        self.sums = [0.0] * 4

    def add(self, terms: _Terms, seconds: float, unit: float) -> None:
        relative = [term / unit for term in terms]
        for i, term in enumerate(relative):
            row = self.products[i]
            row[:] = [_KEPT * old + term * other for old, other in zip(row, relative, strict=True)]
            self.sums[i] = _KEPT * self.sums[i] + term * seconds / unit
        self.count += 1


@dataclass(slots=True)
class StepBudget:
    """Divides a step's tokens among its sequences. While a sequence decodes, prefill gets at most what keeps the step
    within `seconds`, and at least `MIN_CHUNK` tokens. Otherwise, and with infinite `seconds`, only the number of tokens
    is limited.

    With `chosen`, the operator gave no target: `seconds` is raised to twice the time of a step without prefill.
    """

    seconds: float = math.inf
    chosen: bool = False
    cost: StepCost = field(default_factory=StepCost)
    _reach: float = 0.0  # prefill tokens that were lately computed beside decodes
    _context: int | None = None  # that the budget of this step is computed for; None: the step is not limited

    @staticmethod
    def for_device(max_step_ms: float, device: str) -> "StepBudget":
        """Return the budget for `--max-step-ms`; 0 chooses the target by the type of the device."""
        if max_step_ms:
            return StepBudget(max_step_ms / 1e3)
        return StepBudget(DEFAULT_SECONDS.get(device, DEFAULT_SECONDS["cuda"]), chosen=True)

    def tokens(self, running: Iterable[Sequence], waiting: Collection[Sequence], most: int) -> int:
        """Return the number of tokens of the next step, at most `most`."""
        self._context = None
        if self.seconds == math.inf:
            return most
        rows, decoding, contexts = 0, False, []
        for seq in running:
            left = seq.num_tokens - seq.num_computed_tokens
            if left > 1:
                contexts.append(seq.num_computed_tokens)
            elif left:
                rows += 1
                decoding = decoding or seq.num_output_tokens > 0
        if not decoding or not (contexts or waiting):
            return most
        self._context = contexts[0] if contexts else 0
        return min(most, rows + self._chunk(rows, self._context))

    def take(self, seq: Sequence, budget: int) -> tuple[int, int]:
        """Return how many tokens `seq` gets of `budget`, and the budget that is left."""
        context = seq.num_ready_tokens
        left = seq.num_tokens - context
        if self._context is None or left == 1 or context <= self._context:
            taken = min(left, budget)
            return taken, budget - taken
        # Its tokens attend to more than was planned for, such as a cached prefix, and cost more.
        planned, per_token = self.cost.per_token(self._context), self.cost.per_token(context)
        times = per_token / planned if planned > 0 else 1.0
        taken = min(left, max(int(budget / times), min(MIN_CHUNK, budget)))
        return taken, max(budget - math.ceil(taken * times), 0) if taken == left else 0

    def record(self, batch: ScheduledBatch, seconds: float) -> None:
        """Learn from a step that took `seconds`."""
        if self.seconds == math.inf:
            return
        rows, tokens, pairs = 0, 0, 0.0
        for scheduled in batch.sequences:
            number = scheduled.num_new_tokens
            if number == 1:
                rows += 1
            else:
                tokens += number
                pairs += number * (scheduled.start + number / 2)
        self.cost.record(rows, tokens, pairs, seconds)
        if rows and tokens:
            self._reach = max(tokens, _KEPT * self._reach)

    def _chunk(self, rows: int, context: int) -> int:
        seconds = self.seconds
        if self.chosen:
            seconds = max(seconds, self.cost.without_prefill(rows) / DECODE_SHARE)
        fits = min(self.cost.tokens_within(seconds, rows, context), _GROWTH * self._reach)
        return max(int(fits) // GRAIN * GRAIN, MIN_CHUNK)
