"""Modules whose forward pass is replaced for a while, and how each gets its own back."""

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class ForwardOverrides:
    """Replace `forward` on single modules; names, hooks and state dicts stay as they are."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Forward | None]] = []

    def replace(self, module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
        """Let `wrap(forward)` stand for the module's present `forward`."""
        self._before.append((module, module.__dict__.get("forward")))
        module.forward = wrap(module.forward)

    def undo(self) -> None:
        """Put every `forward` back, the last one replaced first."""
        while self._before:
            module, own = self._before.pop()
            if own is None:
                del module.forward
            else:
                module.forward = own
