"""Loading of a whole checkpoint with transformers."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from adapters.runtime.dora import quant_state


def load_causal_lm(path: Any, **options: Any) -> Any:
    """Load a causal LM. Raises `ValueError` if the checkpoint lacks weights of the model, which transformers would fill
    with random numbers, or has some in other shapes."""
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    problems = [f"'{name}' is missing" for name in sorted(found["missing_keys"])]
    problems += [
        f"'{name}' is {list(stored)} and not {list(expected)}"
        for name, stored, expected in [*sorted(found["mismatched_keys"]), *_quantized_in_other_shapes(model)]
    ]
    if problems:
        more = f", and {len(problems) - 3} more are missing or differ" if len(problems) > 3 else ""
        raise ValueError(
            f"its weights are not those of a {type(model).__name__}: {', '.join(problems[:3])}{more}. Check that all "
            "of its files are there and that its config belongs to them"
        )
    return model


def _quantized_in_other_shapes(model: Any) -> Iterator[tuple[str, torch.Size, torch.Size]]:
    """Yield names, stored and expected shapes of quantized weights, which transformers takes in any shape."""
    for name, module in model.named_modules():
        state = quant_state(module) if isinstance(module, nn.Linear) else None
        if state is not None and state.shape != (module.out_features, module.in_features):
            yield f"{name}.weight", state.shape, torch.Size((module.out_features, module.in_features))
