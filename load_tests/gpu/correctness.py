"""The GPU's answers against the CPU's, on a tiny float32 model: each check by itself, one line of results for each.

With `--smoke`, the side of the GPU is the same code on a CPU, in Triton's interpreter.
"""

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from load_tests.gpu.setting import Report
from server.ipc.messages import Merge, Unmerge
from server.model.sampling.sampler import sample
from server.request import SamplingParams
from server.sequence import Sequence
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver

SHARED: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "scale": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "lora": SHARED,
    "rank 24, rslora": {**SHARED, "r": 24, "use_rslora": True},
    "dora": {**SHARED, "use_dora": True},
    "biases": {**SHARED, "lora_bias": True},
    "saved norms and head": {**SHARED, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "tokens": {**SHARED, "trainable_token_indices": [5, 30, 90]},
    "embedding": {**SHARED, "target_modules": ["embed_tokens", "v_proj"]},
}
SMOKE_KINDS = ["lora", "saved norms and head"]
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 0.4, "logit_bias": {3: 2.0}},
}
Answers = dict[str, list[int]]


@dataclass
class Lab:
    """A model with adapters on disk, and engines over it: `reference` on the CPU, `tested` on the device."""

    folder: Path
    smoke: bool
    under_test: Callable[[], Any]
    kinds: dict[str, dict[str, Any]]
    drivers: list[Driver] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return 2 if self.smoke else 24

    def prepare(self) -> None:
        layers = 1 if self.smoke else 2
        sizes = {"hidden_size": 32, "intermediate_size": 48} if self.smoke else {}
        model = tiny_llama(num_hidden_layers=layers, initializer_range=0.3, **sizes)
        model.save_pretrained(self.folder / "model")
        for seed, (name, config) in enumerate(self.kinds.items()):
            write_adapter(model, self.folder / name, seed=seed, **config)

    def reference(self, **settings: Any) -> Driver:
        return self._driver("cpu", settings)

    @contextmanager
    def tested(self, **settings: Any) -> Iterator[Driver]:
        with self.under_test():
            yield self._driver("cpu" if self.smoke else "cuda", settings)

    def _driver(self, device: str, settings: dict[str, Any]) -> Driver:
        data = Path(tempfile.mkdtemp(dir=self.folder))
        driver = make_driver(self.folder / "model", data, device=device, max_num_seqs=8, **settings)
        self.drivers.append(driver)
        return driver

    def prompts(self) -> dict[str, list[int]]:
        long = 20 if self.smoke else 150
        return {"short": [5, 17, 42], "long": [3 + 7 * i % 90 for i in range(long)], "one": [9]}

    def answers(self, driver: Driver, kinds: list[str], **sampling: Any) -> Answers:
        """Every prompt with the base and with every adapter, all at once."""
        digests = {kind: driver.add_adapter(self.folder / kind) for kind in kinds}
        names = []
        for number, kind in enumerate(["base", *kinds]):
            for name, prompt in self.prompts().items():
                names.append(f"{kind} {name}")
                settings = {"max_tokens": self.tokens, "seed": number, **sampling}
                driver.submit(names[-1], prompt, digests.get(kind), **settings)
        driver.run()
        return {name: driver.tokens(name) for name in names}

    def close(self) -> None:
        for driver in self.drivers:
            driver.engine.close()
        self.drivers.clear()


def run(report: Report, under_test: Callable[[], Any] = nullcontext) -> None:
    smoke = report.setting.smoke
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder), smoke, under_test, {name: KINDS[name] for name in SMOKE_KINDS} if smoke else KINDS)
        lab.prepare()
        for name, check in CHECKS.items():
            started, error = time.monotonic(), ""
            try:
                check(lab)
            except Exception as failure:
                traceback.print_exc()
                error = f"{type(failure).__name__}: {failure}"[:500]
            seconds = time.monotonic() - started
            report.add("correctness", check=name, ok=not error, seconds=seconds, error=error)
            lab.close()


def starts(lab: Lab) -> None:
    """The probe compares the paged attention with the stock one; then the model is fused."""
    with lab.tested(eager=True) as driver:
        print(driver.info.description, "fused modules:", driver.engine._runner.fused)


def eager(lab: Lab) -> None:
    _same(lab, ["lora"], eager=True)


def captured(lab: Lab) -> None:
    stats = _same(lab, ["lora"]).steps[-1].stats
    if not lab.smoke:
        assert stats.graph_steps > 0, stats


def overlapped(lab: Lab) -> None:
    expected = lab.answers(lab.reference(), ["lora"])
    for overlap in (False, True):
        with lab.tested() as driver:
            driver.engine.overlap = overlap
            _equal(lab.answers(driver, ["lora"]), expected)


def seeded(lab: Lab) -> None:
    expected = lab.answers(lab.reference(), ["lora"], temperature=0.8, top_p=0.9)
    with lab.tested() as driver:
        _equal(lab.answers(driver, ["lora"], temperature=0.8, top_p=0.9), expected)


def samplers(lab: Lab) -> None:
    """The same logits give the same tokens on both devices, and in any number of rows."""
    device = "cpu" if lab.smoke else "cuda"
    logits = torch.randn(len(SAMPLING), 32000, generator=torch.Generator().manual_seed(0)) * 3
    for seed in range(20):
        seqs = [
            Sequence(name, [1, 2], SamplingParams(**{"max_tokens": 9, "temperature": 1.0, "seed": seed, **params}))
            for name, params in SAMPLING.items()
        ]
        found = [[s.token_id for s in sample(logits.to(kind), seqs, frozenset())] for kind in ("cpu", device)]
        alone = [
            sample(logits[row : row + 1].to(device), [seq], frozenset())[0].token_id for row, seq in enumerate(seqs)
        ]
        assert found[0] == found[1] == alone, (seed, found, alone)


def kinds(lab: Lab) -> None:
    _same(lab, list(lab.kinds), adapter_slots=len(lab.kinds))


def chunks(lab: Lab) -> None:
    """Prompts in chunks beside decoding sequences."""
    _same(lab, ["lora"], max_batch_tokens=16)


def merges(lab: Lab) -> None:
    """Merged, graphs are recorded again; after it, the base's own are used."""
    seen = []
    for context in (nullcontext(lab.reference()), lab.tested()):
        with context as driver:
            digest = driver.add_adapter(lab.folder / "lora")
            tokens = []
            for number, request in enumerate([None, Merge(1, digest), Unmerge(2), None]):
                if request is not None:
                    driver.engine.handle(request)
                    while request.request_id not in driver.replies:
                        driver.step()
                    assert driver.replies[request.request_id].error is None, driver.replies
                driver.submit(f"{number}", [5, 17, 42], None if number in (2, 3) else digest, max_tokens=lab.tokens)
                driver.run()
                tokens.append(driver.tokens(f"{number}"))
            assert tokens[2] == tokens[3]
            seen.append(tokens)
    assert seen[0] == seen[1], seen


def swaps(lab: Lab) -> None:
    """More adapters than slots, loaded while others decode."""
    _same(lab, list(lab.kinds), adapter_slots=2)


def _same(lab: Lab, names: list[str], **settings: Any) -> Driver:
    expected = lab.answers(lab.reference(**settings), names)
    with lab.tested(**settings) as driver:
        _equal(lab.answers(driver, names), expected)
    return driver


def _equal(found: Answers, expected: Answers) -> None:
    different = [name for name, tokens in expected.items() if found[name] != tokens]
    assert not different, {name: (found[name], expected[name]) for name in different[:3]}


CHECKS: dict[str, Callable[[Lab], None]] = {
    "the model starts": starts,
    "eager steps": eager,
    "captured steps": captured,
    "steps launched ahead": overlapped,
    "seeded answers": seeded,
    "samplers": samplers,
    "every kind of adapter": kinds,
    "prefill in chunks": chunks,
    "merge and unmerge": merges,
    "swaps under load": swaps,
}
