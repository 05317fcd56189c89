"""An adapter's rows in a mixed batch match PEFT with that adapter alone, by feature and by kind of base model."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import (
    PeftConfig,
)
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from adapters.errors import AdapterInvalid
from adapters.kernels import choose_kernel
from adapters.kernels.grouped import GroupedKernel
from adapters.kernels.reference import ReferenceKernel
from adapters.residency.slots import PAGE_COLUMNS
from adapters.runtime.dora import dora_scale
from adapters.weights import LoraFactors
from server.ipc.messages import Abort, RunSelfTest
from tests.fixtures.adapter_factory import (
    tiny_llama,
    with_peft,
    write_adapter,
    write_earlier_adapter,
    write_peft_adapter,
)
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.parity_cases import BASES, CASES, INVOCATION, LLAMA_CASES, LLAMA_PEFT_TYPES, NOT_ON_NF4

KERNELS: dict[str, Any] = {
    "chosen": choose_kernel,
    "reference": lambda *_: (ReferenceKernel(), "the specification"),
    "grouped": lambda device, _: (GroupedKernel(device), "torch matmuls"),
}
NEW_TOKENS = 6
ROUTED = ("mixtral", "qwen3moe")


def with_biases(model: nn.Module) -> nn.Module:
    """Biases start at zero, which would hide what is done to them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def build(kind: str) -> nn.Module:
    large = {"initializer_range": 0.2, "intermediate_size": 128}
    if kind.startswith("llama"):
        return with_biases(tiny_llama(**large, attention_bias=True, mlp_bias=True))
    if kind == "tied":
        return tiny_llama(**large, tie_word_embeddings=True)
    torch.manual_seed(0)
    if kind.startswith("qwen3moe"):
        sizes = {**large, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "hidden_size": 64}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
        qwen = Qwen3MoeConfig(**sizes, **experts, num_hidden_layers=2, head_dim=16, max_position_embeddings=128)
        return Qwen3MoeForCausalLM(qwen).eval()
    if kind.startswith("mixtral"):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        sizes = {**large, **heads, "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2}
        return MixtralForCausalLM(MixtralConfig(**sizes, max_position_embeddings=128, eos_token_id=2)).eval()
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 97}
    config = GPT2Config(**sizes, initializer_range=0.2, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    return with_biases(GPT2LMHeadModel(config).eval())


@dataclasses.dataclass
class World:
    """One base model under an engine of 4 slots, with every case's adapter in its store."""

    kind: str
    base: str
    folder: Path
    driver: Driver
    digests: dict[str, str]
    logits: dict[str, list[Tensor]]

    def reference(self, case: str | None) -> Any:
        """PEFT with that adapter alone, on the same base."""
        dtype, options = BASES[self.base], {}
        if self.base == "nf4":
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        model = AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=dtype, **options).eval()
        if self.base == "nf4" and self.kind.endswith("PEFT types"):
            model = model.dequantize()  # PEFT has not every type on quantised linears
        return model if case is None else with_peft(model, self.folder / case, own_vocabulary(self.kind, case))

    def run(self, *cases: str | None, seed: int = 0, length: int = 21) -> list[tuple[list[int], list[int], Tensor]]:
        """Prompt, tokens and logits of one sequence per case, all in one batch; None is the base."""
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(3, 90, (length,), generator=generator).tolist()
        prompt[10:13] = INVOCATION
        self.logits.clear()
        for index, case in enumerate(cases):
            adapter = None if case is None else self.digests[case]
            active_from = 10 if case is not None and is_activated(CASES[self.kind][case]) else 0
            self.driver.submit(f"s{index}", prompt, adapter, active_from=active_from, max_tokens=NEW_TOKENS)
            self.driver.outputs.pop(f"s{index}", None)
        self.driver.run()
        return [(prompt, self.driver.tokens(f"s{i}"), self._logits(f"s{i}", case)) for i, case in enumerate(cases)]

    def _logits(self, seq_id: str, case: str | None) -> Tensor:
        """Over the adapter's own vocabulary: a batch's rows are as wide as its largest."""
        vocab_size = (None if case is None else own_vocabulary(self.kind, case)) or 97
        return torch.stack([row[:vocab_size] for row in self.logits[seq_id]])


def own_vocabulary(kind: str, case: str) -> int | None:
    settings = CASES[kind][case]
    return None if isinstance(settings, PeftConfig) else settings.get("vocab_size")


def recorded(driver: Driver) -> dict[str, list[Tensor]]:
    """The logits that every sequence was sampled from, as they come."""
    engine, logits = driver.engine, defaultdict(list)
    run, forward_batch = engine._runner.run, engine._forward_batch
    sampled: list[str] = []

    def note(batch: Any, *more: Any) -> Any:
        sampled[:] = [s.seq.seq_id for s in batch.sequences if s.samples]
        return forward_batch(batch, *more)

    def observed(*args: Any) -> Tensor:
        rows = run(*args)
        if len(args) > 1:  # a self-test, in a cache of its own
            return rows
        for seq_id, row in zip(sampled, rows, strict=True):
            logits[seq_id].append(row.clone())
        return rows

    engine._forward_batch, engine._runner.run = note, observed  # type: ignore[method-assign]
    return logits


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], World]]:
    """NF4 is computed without bitsandbytes' bf16 kernel for some CPUs: PEFT's DoRA would misread its reordered weights,
    and bf16 inside would hide differences."""
    made: list[World] = []
    patch = pytest.MonkeyPatch()
    patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

    @cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp(kind)
        model = build(kind)
        model.save_pretrained(path / "model")  # type: ignore[operator]
        for seed, (case, settings) in enumerate(CASES[kind].items()):
            if isinstance(settings, PeftConfig):
                write_peft_adapter(model, path / case, settings, seed=seed)
            elif kind.endswith("earlier names"):
                write_earlier_adapter(model, path / case, seed=seed, **settings)
            else:
                write_adapter(model, path / case, seed=seed, **settings)
        return path

    @cache
    def make(kind: str, base: str, kernel: str = "chosen") -> World:
        patch.setattr("server.model.runner.choose_kernel", KERNELS[kernel])
        options = {"dtype": "bfloat16" if base == "bf16" else "float32", "adapter_slots": 4}
        if base == "nf4":
            options["quantization"] = "nf4"
        driver = make_driver(folder(kind) / "model", tmp_path_factory.mktemp("data"), **options)
        digests = {case: driver.add_adapter(folder(kind) / case) for case in cases_on(kind, base)}
        made.append(World(kind, base, folder(kind), driver, digests, recorded(driver)))
        return made[-1]

    yield make
    for one in made:
        one.driver.engine.residency.close()
    patch.undo()


def assert_peft_agrees(world: World, case: str | None, prompt: list[int], tokens: list[int], logits: Tensor) -> None:
    """Judged on our own tokens: equal logits at each of them mean the same greedy tokens."""
    assert len(tokens) == NEW_TOKENS
    activated = case is not None and is_activated(CASES[world.kind][case])
    expected = logits_on(world.reference(case), prompt, tokens, activated)
    if world.base == "bf16":
        exact = logits_on(world.reference(case).float(), prompt, tokens, activated)
        assert_as_close_as_bf16_allows(logits, expected, exact, flips=world.kind.startswith(ROUTED))
        return
    assert (logits - expected).abs().max() < 1e-4
    assert tokens == expected.argmax(-1).tolist()


@torch.inference_mode()
def logits_on(model: Any, prompt: list[int], tokens: list[int], activated: bool = False) -> Tensor:
    ids = torch.tensor([prompt + tokens])
    options: dict[str, Any] = {"alora_offsets": [ids.shape[1] - 10]} if activated else {}  # counted from the end
    if getattr(model, "peft_type", None) == "MULTITASK_PROMPT_TUNING":
        options["task_ids"] = torch.tensor([0])
    logits: Tensor = model(input_ids=ids, use_cache=False, **options).logits[0]  # with rows of virtual tokens before
    return logits[-len(tokens) - 1 : -1].float()


def is_activated(settings: Any) -> bool:
    """`settings` are a LoRA's, or the config of another type."""
    return isinstance(settings, dict) and "alora_invocation_tokens" in settings


def assert_as_close_as_bf16_allows(logits: Tensor, expected: Tensor, exact: Tensor, flips: bool = False) -> None:
    """`exact` is PEFT in float32 on the same bf16 weights, `noise` how far PEFT in bf16 is from it. We may be three
    times as far (our factors are bf16 too, an output is rounded once more, and both are single draws: 0.6 to 2.8 was
    seen), and a token may differ where the errors of its row decide: three times what the difference of two logits
    has of them. Where a router chooses experts, rounding `flips` the choice of a token whose experts are nearly tied:
    one row of a sequence may be off by more."""
    noise = (expected - exact).square().mean().sqrt()
    rows = (logits.float() - exact).square().mean(-1).sort().values
    assert (rows[:-1] if flips else rows).mean().sqrt() <= 3 * noise
    picked = expected.gather(-1, logits.float().argmax(-1, keepdim=True))[:, 0]
    best = expected.amax(-1)
    step = torch.exp2(best.abs().log2().floor() - 7)
    errors = sum((found.float() - exact).square().mean(-1).sqrt() for found in (logits, expected))
    assert ((best - picked) <= torch.maximum(2 * step, 3 * 2**0.5 * errors)).all()


def cases_on(kind: str, base: str) -> list[str]:
    return [case for case in CASES[kind] if base != "nf4" or case not in NOT_ON_NF4]


@pytest.mark.parametrize(("kind", "case"), [(k, case) for k in CASES for case in CASES[k] if case in NOT_ON_NF4])
def test_a_copy_of_a_quantised_weight_is_refused(kind: str, case: str, world: Callable[[str, str], World]) -> None:
    here = world(kind, "nf4")
    with pytest.raises(AdapterInvalid, match="not quantised") as error:
        here.driver.add_adapter(here.folder / case)
    assert any(problem.where.endswith((".v_proj.weight", ".c_fc.weight")) for problem in error.value.problems)


ALL_CASES = [(kind, case, base) for kind in CASES for base in BASES for case in cases_on(kind, base)]


@pytest.mark.parametrize(("kind", "case", "base"), ALL_CASES)
def test_alone(kind: str, case: str, base: str, world: Callable[[str, str], World]) -> None:
    here = world(kind, base)
    (result,) = here.run(case)
    assert_peft_agrees(here, case, *result)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["reference", "grouped"])
@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind in CASES for case in CASES[kind]])
def test_with_every_kernel(kind: str, case: str, kernel: str, world: Callable[..., World]) -> None:
    """The cases above run with the kernel that is chosen for the machine; Triton's has tests of its own."""
    here = world(kind, "fp32", kernel)
    results = here.run(case, "plain", None, seed=5)
    for name, result in zip((case, "plain", None), results, strict=True):
        assert_peft_agrees(here, name, *result)


@pytest.mark.parametrize(("kind", "case", "base"), ALL_CASES)
def test_beside_others(kind: str, case: str, base: str, world: Callable[[str, str], World]) -> None:
    """Beside plain LoRA, the base and other features; prompts are long enough for both forms of the vectors."""
    here = world(kind, base)
    names = cases_on(kind, base)
    one, two = (names[(names.index(case) + offset) % len(names)] for offset in (2, 3))
    results = here.run(case, "plain", None, one, two, case, seed=1, length=33)
    for name, result in ((case, results[0]), (None, results[2]), (one, results[3]), (two, results[4])):
        assert_peft_agrees(here, name, *result)
    assert results[0][1] == results[5][1]


@pytest.mark.parametrize(("kind", "case", "base"), ALL_CASES)
def test_the_self_test_agrees(kind: str, case: str, base: str, world: Callable[[str, str], World]) -> None:
    """The self-test's reference agrees with the serving path, which agrees with PEFT."""
    driver = world(kind, base).driver
    driver.engine.handle(RunSelfTest(1, world(kind, base).digests[case]))
    driver.run()
    result = driver.replies.pop(1).selftest
    assert result is not None
    assert result.relative_error <= (0.03 if base == "bf16" else 1e-5)
    assert (result.max_abs_logit_diff < 1e-4) or base == "bf16"


def test_the_self_test_sees_a_wrong_number(world: Callable[[str, str], World]) -> None:
    here = world("llama", "fp32")
    here.run("plain")  # on the device
    slot = here.driver.engine.residency.slots.get(here.digests["plain"])
    assert slot is not None
    _, b = here.driver.engine._runner.pool.buffers["model.layers.1.mlp.down_proj"]
    row = slot.pages[0] * PAGE_COLUMNS
    before, b[row] = b[row].clone(), 0
    try:
        here.driver.engine.handle(RunSelfTest(1, here.digests["plain"]))
        here.driver.run()
    finally:
        b[row] = before
    result = here.driver.replies.pop(1).selftest
    assert result is not None and result.relative_error > result.tolerance


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("llama", "dora"),
        ("llama", "bias all"),
        ("llama", "lora_bias"),
        ("llama PEFT types", "ia3"),
        ("llama PEFT types", "ia3, feedforward"),
        ("llama PEFT types", "oft"),
        ("llama PEFT types", "boft"),
        ("llama PEFT types", "road"),
        ("llama PEFT types", "shira"),
        ("llama PEFT types", "c3a"),
        ("llama", "embedding"),
        ("llama", "saved head and norms"),
        ("llama", "tokens at both ends"),
        ("llama", "larger vocabulary"),
        ("mixtral", "experts and router"),
    ],
)
def test_others_keep_their_bits_beside_vectors(
    kind: str, case: str, base: str, world: Callable[[str, str], World]
) -> None:
    here = world(kind, base)
    here.run("plain", None, case, seed=2)  # both adapters are on the device now
    engine = here.driver.engine
    for index, name in enumerate(("plain", None, case)):
        prompt = list(range(5 + index, 40 - index))
        here.driver.submit(f"bits{index}", prompt, name and here.digests[name], max_tokens=1)
    batch = engine.scheduler.schedule()
    neighbour = batch.sequences[[s.seq.seq_id for s in batch.sequences].index("bits2")]
    beside = engine._runner.run(engine._forward_batch(batch))
    held = neighbour.seq.slots, neighbour.seq.adapters
    neighbour.seq.slots, neighbour.seq.adapters = (), ()
    alone = engine._runner.run(engine._forward_batch(batch))
    neighbour.seq.slots, neighbour.seq.adapters = held
    # A neighbour's own vocabulary makes the rows wider.
    changed = [not torch.equal(a[:97], b) for a, b in zip(beside, alone, strict=True)]
    assert changed == [s is neighbour for s in batch.sequences]
    engine.handle(Abort(["bits0", "bits1", "bits2"]))
    here.driver.run()


def test_a_feature_is_more_than_its_factors(world: Callable[[str, str], World]) -> None:
    """The adapters are made so that a vector that was lost would show."""
    here = world("llama", "fp32")
    for case in ("lora_bias", "bias all", "dora"):
        adapted, base = (logits for _, _, logits in here.run(case, None, seed=3))
        assert (adapted - base).abs().max() > 0.1, case


@pytest.mark.parametrize("kind", ["llama PEFT types", "gpt2 PEFT types"])
def test_every_adapter_does_something(kind: str, world: Callable[[str, str], World]) -> None:
    for case in CASES[kind]:
        adapted, base = (logits for _, _, logits in world(kind, "fp32").run(case, None, seed=3))
        assert (adapted - base).abs().max() > 0.1, case


def test_a_slot_that_changes_hands_keeps_nothing(world: Callable[[str, str], World], tmp_path: Path) -> None:
    folder = world("llama", "fp32").folder
    driver = make_driver(folder / "model", tmp_path, adapter_slots=1)
    digests = {case: driver.add_adapter(folder / case) for case in LLAMA_CASES}
    here = World("llama", "fp32", folder, driver, digests, recorded(driver))
    order = ["dora", "plain", "bias all", "bias lora_only", "dora", "dora on lm_head", "lora_bias", "rslora"]
    for case in order:
        (result,) = here.run(case, seed=4)
        assert_peft_agrees(here, case, *result)
    assert not driver.engine._runner.pool.scale_shift._tables  # a plain adapter needs none
    driver.engine.residency.close()


def test_a_slot_keeps_nothing_of_scales_either(world: Callable[[str, str], World], tmp_path: Path) -> None:
    folder = world("llama PEFT types", "fp32").folder
    driver = make_driver(folder / "model", tmp_path, adapter_slots=1)
    digests = {case: driver.add_adapter(folder / case) for case in LLAMA_PEFT_TYPES}
    here = World("llama PEFT types", "fp32", folder, driver, digests, recorded(driver))
    pool = driver.engine._runner.pool
    inputs = ["ia3, feedforward", "loha", "ia3, inputs by a pattern", "ia3, feedforward"]
    for case in ["ia3", "plain", "oft", *inputs, "road", "shira", "boft", "plain"]:
        (result,) = here.run(case, seed=4)
        assert_peft_agrees(here, case, *result)
        assert bool(pool.input_scale_shift._tables) == (case in ("ia3, feedforward", "ia3, inputs by a pattern"))
        assert bool(pool.row_maps._by_slot) == (case in ("oft", "road", "shira", "boft"))
        driver.engine.check_integrity()
    assert not pool.scale_shift._tables and not pool.extra_bytes()
    driver.engine.residency.close()


def test_dora_on_a_weight_that_a_cpu_kernel_reordered() -> None:
    """The layer says so only after its first use, on CPUs with bf16 instructions; elsewhere both are the same."""
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4").eval()
    linear = linear.requires_grad_(False).to("cpu")
    factors = LoraFactors(torch.randn(4, 128), torch.randn(64, 4), 0.5, magnitude=torch.rand(64) + 1)
    before = dora_scale(linear, factors)
    assert before is not None
    expected = factors.magnitude / torch.linalg.vector_norm(  # type: ignore[operator]
        dequantize_module_weight(linear).float() + 0.5 * factors.b @ factors.a, dim=1
    )
    torch.testing.assert_close(before, expected)
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    output = linear(x)
    torch.testing.assert_close(dora_scale(linear, factors), before, atol=0, rtol=2**-8)  # its block scales are bf16
    assert torch.equal(linear(x), output)
