"""Train a LoRA by GRPO with TRL, sampled on a Loraplex server that gets the adapter after every step.

    pip install -r examples/requirements-grpo.txt
    loraplex serve --dtype float32 &
    python examples/train_grpo.py --url http://127.0.0.1:8000 --steps 30 --plot curve.svg

Only the adapter travels: 3.7 MB for rank 8. TRL is not changed; its hook is `rollout_func`, which returns the tokens
and the log-probabilities that the server sampled them with. The reward is brevity, which needs no labels and which a
small model can learn in minutes on a CPU.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import matplotlib.pyplot as plt
import torch
from datasets import Dataset
from peft import LoraConfig
from publish_adapter import PublishAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

NAME = "grpo-policy"
KINDS = ["an animal", "a colour", "a city", "a fruit", "a tool", "a river", "a sport", "a planet"]
MOST_TOKENS = 16


def reward_brevity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """From 1 for nothing to 0 for an answer that was cut."""
    return [1 - len(tokens) / MOST_TOKENS for tokens in completion_ids]


class LoraplexRollouts:
    """TRL's `rollout_func`: publishes the trainer's adapter if it has changed, and samples on the server."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=600, limits=httpx.Limits(keepalive_expiry=2))
        self._publish = PublishAdapter(url, NAME).publish
        self._published = -1
        self.gaps: list[float] = []  # by step: mean |log-probability of the server − that of the trainer| of the tokens

    def __call__(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        if trainer.state.global_step != self._published:
            self._publish_adapter(trainer)
        prompt_ids, completion_ids, logprobs = [], [], []
        for first in range(0, len(prompts), trainer.num_generations):  # equal prompts stand side by side
            for sampled in self._sample(prompts[first], trainer):
                prompt_ids.append(sampled["prompt"])
                completion_ids.append(sampled["completion"])
                logprobs.append(sampled["logprobs"])
        self.gaps.append(_gap(trainer, prompt_ids, completion_ids, logprobs))
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logprobs}

    def _publish_adapter(self, trainer: GRPOTrainer) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
            self._publish(Path(folder))
        self._published = trainer.state.global_step

    def _sample(self, messages: Any, trainer: GRPOTrainer) -> list[dict[str, Any]]:
        args = trainer.args
        body = {
            "model": NAME,
            "messages": messages,
            "n": trainer.num_generations,
            "max_tokens": args.max_completion_length,
            "temperature": args.temperature,
            "logprobs": True,
            "return_token_ids": True,
        }
        response = self._http.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        return [
            {
                "prompt": answer["prompt_token_ids"],
                "completion": choice["token_ids"],
                "logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
            }
            for choice in answer["choices"]
        ]


@torch.no_grad()
def _gap(
    trainer: GRPOTrainer, prompts: list[list[int]], completions: list[list[int]], sampled: list[list[float]]
) -> float:
    """Compare the server's log-probabilities with those of the trainer's own model."""
    model, differences = trainer.model, []
    longest = max(map(len, completions))
    for prompt in {tuple(prompt): None for prompt in prompts}:
        rows = [i for i, each in enumerate(prompts) if tuple(each) == prompt]
        padded = [[*prompt, *completions[i], *[0] * (longest - len(completions[i]))] for i in rows]  # at the end
        ids = torch.tensor(padded, device=model.device)
        own = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
        mine = own.gather(-1, ids[:, len(prompt) :, None]).squeeze(-1).tolist()
        differences += [
            abs(a - b) for row, i in zip(mine, rows, strict=True) for a, b in zip(row, sampled[i], strict=False)
        ]
    return fmean(differences)


def train(url: str, model: str, steps: int, prompts: int, generations: int) -> tuple[list[float], list[float]]:
    """Return the mean reward and the mean difference of log-probabilities of each step."""
    rollouts = LoraplexRollouts(url)
    rows = [{"prompt": [{"role": "user", "content": f"Name {kind}."}]} for kind in KINDS]
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=prompts * generations,
            num_generations=generations,
            max_completion_length=MOST_TOKENS,
            learning_rate=2e-3,
            lr_scheduler_type="constant",
            temperature=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
        )
        lora = LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            reward_funcs=reward_brevity,
            args=settings,
            train_dataset=Dataset.from_list(rows * steps),
            peft_config=lora,
            rollout_func=rollouts,
        )
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return rewards, rollouts.gaps


def plot(path: Path, rewards: list[float], gaps: list[float]) -> None:
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), height_ratios=(2, 1))
    steps = range(1, len(rewards) + 1)
    above.plot(steps, rewards, marker=".")
    above.set_ylabel("mean reward: brevity")
    below.semilogy(range(1, len(gaps) + 1), gaps, color="tab:orange")
    below.set_ylabel("mean |Δ log-prob|")
    below.set_xlabel("step")
    above.set_title("GRPO with TRL, sampled on Loraplex")
    figure.tight_layout()
    figure.savefig(path)


def main(run: Callable[..., tuple[list[float], list[float]]] = train) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="the base model of the server")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=2, help="of a step")
    parser.add_argument("--generations", type=int, default=8, help="of a prompt")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    rewards, gaps = run(options.url, options.model, options.steps, options.prompts, options.generations)
    fifth = max(len(rewards) // 5, 1)
    print(f"reward of the first {fifth} steps {fmean(rewards[:fifth]):.3f}, of the last {fmean(rewards[-fifth:]):.3f}")
    print(f"mean |log-prob(server) - log-prob(trainer)|: {fmean(gaps):.2e}, largest step {max(gaps):.2e}")
    if options.out:
        options.out.write_text(json.dumps({"rewards": rewards, "gaps": gaps}))
    if options.plot:
        plot(options.plot, rewards, gaps)


if __name__ == "__main__":
    main()
