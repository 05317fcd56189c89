"""Train a LoRA adapter for Loraplex on a small JSONL file: minutes on two CPU cores.

    python examples/train_adapter.py pirate --out examples/adapters/pirate
    python examples/train_adapter.py my-data.jsonl --out my-adapter

The data holds one `{"prompt": ..., "answer": ...}` per line. The prompt goes through the base model's chat
template, exactly as the server does it, and only the tokens of the answer count in the loss. The result is the
two files that the server reads: `adapter_config.json` and `adapter_model.safetensors`.
"""

import json
import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from server.model.loading.default_model import prepare_default_model

DATA = Path(__file__).parent / "data"
IGNORED = -100  # the label that the loss skips
LORA = LoraConfig(
    task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.05, bias="none", target_modules=["q_proj", "v_proj"]
)


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as tokens; its first `prompt_length` tokens are given, the rest is to be learned."""

    tokens: list[int]
    prompt_length: int

    @property
    def labels(self) -> list[int]:
        return [IGNORED] * self.prompt_length + self.tokens[self.prompt_length :]


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [encode(row["prompt"], row["answer"], tokenizer) for row in rows]


def encode(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    given = tokenizer.encode(text, add_special_tokens=False)  # the template has written them already
    learned = tokenizer.encode(answer, add_special_tokens=False)
    return Example([*given, *learned, tokenizer.eos_token_id], len(given))


def collate(examples: list[Example], padding: int) -> dict[str, torch.Tensor]:
    """Pad on the right to the longest example of the batch."""
    longest = max(len(example.tokens) for example in examples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.tokens for example in examples], padding),
        "attention_mask": padded([[1] * len(example.tokens) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }


def train(model: PeftModel, batches: list[dict[str, torch.Tensor]], rate: float) -> float:
    """Take one step per batch; return the mean loss of the last ten."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, len(batches) // 20, len(batches))
    recent: deque[float] = deque(maxlen=10)
    model.train()
    columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}")) as progress:
        task = progress.add_task("train", total=len(batches), loss=float("nan"))
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            recent.append(loss.item())
            progress.update(task, advance=1, loss=fmean(recent))
    return fmean(recent)


def save_adapter(model: PeftModel, out: Path, base_name: str) -> None:
    """Write the two files of an adapter: weights as bfloat16, and a config free of local paths."""
    out.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set, whose order would change from run to run
    config.save_pretrained(out)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})


def main(
    data: Annotated[str, typer.Argument(help="Name of a demo (pirate, extract-json, sql) or a JSONL file.")],
    out: Annotated[Path, typer.Option(help="Folder for the adapter.")],
    base: Annotated[Path | None, typer.Option(help="Folder of the base model; default: the embedded one.")] = None,
    epochs: int = 3,
    batch_size: int = 8,
    rate: float = 1e-3,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train one LoRA adapter and write it to OUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    shuffler = random.Random(seed)

    base = base or prepare_default_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LORA)
    examples = read_examples(Path(data) if data.endswith(".jsonl") else DATA / f"{data}.jsonl", tokenizer)

    batches = []
    for _ in range(epochs):
        shuffler.shuffle(examples)
        starts = range(0, len(examples), batch_size)
        batches += [collate(examples[at : at + batch_size], tokenizer.pad_token_id) for at in starts]
    loss = train(model, batches, rate)
    save_adapter(model, out, base.name)
    print(f"{out}: {len(examples)} examples, {len(batches)} steps, final loss {loss:.3f}")


if __name__ == "__main__":
    typer.run(main)
