"""Every adapter of the corpus is applied exactly or refused by name; there is nothing in between."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, LlamaForTokenClassification

from adapters.errors import AdapterInvalid
from adapters.traits import Traits
from adapters.validation.inspect import inspect
from tests.fixtures.adapter_factory import resized, tiny_llama, with_peft, write_adapter, write_peft_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.peft_corpus import CORPUS, INVOCATION, LORA, Entry
from tests.test_peft_parity import NEW_TOKENS, build, logits_on, recorded

VOCAB_SIZE = 97


@cache
def model_of(kind: str) -> nn.Module:
    """A base model, or another one of its sizes that an adapter was made on."""
    if kind == "wider llama":
        return tiny_llama(hidden_size=96)
    if kind == "deeper llama":
        return tiny_llama(num_hidden_layers=3, intermediate_size=128)
    heads = {"classifier": LlamaForSequenceClassification, "token classifier": LlamaForTokenClassification}
    llama: Any = build("llama")
    if kind in heads:
        return heads[kind](llama.config)  # type: ignore[no-any-return]
    return llama.model if kind == "decoder" else build(kind)  # type: ignore[no-any-return]


def write(entry: Entry, folder: Path) -> None:
    """As PEFT saves it, with all that is trained moved away from where it starts."""
    config = entry.config if isinstance(entry.config, PeftConfig) else LoraConfig(**{**LORA, **entry.config})
    base = resized(copy.deepcopy(model_of(entry.made_on or entry.base)), entry.vocab_size)
    write_peft_adapter(base, folder, config, save_embedding_layers=entry.save_embedding_layers)
    if entry.dtype != torch.float32:
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor.to(entry.dtype) for name, tensor in load_file(path).items()}, path)


def prompt_of(seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(3, 80, (21,), generator=generator).tolist()
    return [*prompt[:9], *INVOCATION, *prompt[9:]]


@dataclass
class World:
    """A base model under an engine, and a plain adapter that is in its store."""

    model: nn.Module
    driver: Driver
    plain: Path
    plain_digest: str
    logits: dict[str, list[Tensor]]

    def run(self, prompt: list[int], *adapters: str | None) -> list[tuple[list[int], Tensor]]:
        """Tokens and logits of one sequence per adapter, all in one batch; None is the base."""
        self.logits.clear()
        self.driver.outputs.clear()
        for index, digest in enumerate(adapters):
            self.driver.submit(f"s{index}", prompt, digest, self._active_from(digest, prompt), max_tokens=NEW_TOKENS)
        self.driver.run()
        names = [f"s{index}" for index in range(len(adapters))]
        return [(self.driver.tokens(name), torch.stack(self.logits[name])) for name in names]

    def _active_from(self, digest: str | None, prompt: list[int]) -> int:
        if digest is None:
            return 0
        invocation = Traits.of(inspect(self.driver.store.path(digest), self.driver.info.spec).report).invocation_tokens
        return prompt.index(invocation[0]) if invocation else 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], World]]:
    made: list[World] = []

    @cache
    def make(base: str) -> World:
        folder = tmp_path_factory.mktemp(base)
        model = model_of(base)
        model.save_pretrained(folder / "model")  # type: ignore[operator]
        plain = write_adapter(model, folder / "plain", target_modules="all-linear", scale=0.2)
        driver = make_driver(folder / "model", folder / "data")
        made.append(World(model, driver, plain, driver.add_adapter(plain), recorded(driver)))
        return made[-1]

    yield make
    for one in made:
        one.driver.engine.residency.close()


@pytest.mark.parametrize("name", CORPUS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's, about odd configs
def test_applied_exactly_or_refused_by_name(name: str, world: Callable[[str], World], tmp_path: Path) -> None:
    entry, here = CORPUS[name], world(CORPUS[name].base)
    write(entry, tmp_path)
    try:
        digest = here.driver.add_adapter(tmp_path)
    except AdapterInvalid as error:
        assert entry.if_refused is not None, error.problems
        assert any(entry.if_refused in problem.where for problem in error.problems), error.problems
        return
    reference = with_peft(here.model, tmp_path, entry.vocab_size)
    prompt = prompt_of(0)
    (alone,) = here.run(prompt, digest)
    assert_same(reference, prompt, alone)
    prompt = prompt_of(1)
    plain, own, base = here.run(prompt, here.plain_digest, digest, None)
    assert_same(with_peft(here.model, here.plain), prompt, plain)
    assert_same(reference, prompt, own)
    assert_same(here.model, prompt, base)
    assert (own[1][:, :90] - base[1][:, :90]).abs().max() > 0.01  # it does something


def assert_same(model: Any, prompt: list[int], result: tuple[list[int], Tensor]) -> None:
    """Judged on our own tokens: equal logits at each of them mean the same greedy tokens."""
    tokens, logits = result
    assert len(tokens) == NEW_TOKENS
    expected = logits_on(model, prompt, tokens)
    assert (logits[:, : expected.shape[1]] - expected).abs().max() < 1e-4
    assert tokens == expected.argmax(-1).tolist()
