"""Progress within a long step, so that the supervisor can tell a slow engine from one that hangs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

LONG_SECONDS = 1.0  # steps that may take longer are watched; hooks on layers would slow down the others


class StepProgress:
    """Calls `report` when a step that may be long begins, and whenever a layer of `model` begins in it."""

    def __init__(self, model: nn.Module) -> None:
        stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        self._layers: list[nn.Module] = [*next(stacks, ())]  # the first one holds the model's layers
        self._seconds_per_token = float("inf")  # of the last step; an upper bound for the tokens of a larger one
        self.report: Callable[[], None] = lambda: None

    def took(self, num_tokens: int, seconds: float) -> None:
        """Record the duration of a step."""
        if num_tokens:
            self._seconds_per_token = seconds / num_tokens

    @contextmanager
    def watched(self, num_tokens: int) -> Iterator[None]:
        """Report the progress of a step of `num_tokens` if it may be long."""
        if num_tokens * self._seconds_per_token < LONG_SECONDS:
            yield
            return
        self.report()
        hooks = [layer.register_forward_pre_hook(lambda *_: self.report()) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
