"""Where a non-finite value first appeared: one more forward pass, under hooks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stability_search.engine import batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where the fault was first seen.

    Attributes:
        module: Name of the module that turned finite inputs non-finite; None if none did.
        phase: `forward` or `loss`; None if the fault did not show again.
    """

    module: str | None
    phase: str | None


def _is_broken(value: Any) -> bool:  # noqa: ANN401 - whatever a module takes or gives
    # -Inf alone is no offender: an additive mask is full of it.
    return any(
        bool((torch.isnan(tensor) | torch.isposinf(tensor)).any())
        for _, tensor in batches.tensors(value)
        if tensor.is_floating_point()
    )


def trace_forward(model: nn.Module, run: Callable[[], torch.Tensor]) -> Origin:
    """Run a forward pass again and name the first module that broke.

    Args:
        model: The model whose modules are watched.
        run: The forward pass; returns the loss. What it raises is swallowed: it is the fault
            under investigation.

    Returns:
        The origin; a module that only passes on a broken input is not named while one that
        broke finite inputs is known.
    """
    origins: list[str] = []
    carriers: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        if _is_broken(output):
            broken_input = _is_broken(args) or _is_broken(kwargs)
            (carriers if broken_input else origins).append(names[module])

    hooks = [m.register_forward_hook(watch, with_kwargs=True) for m in names]
    try:
        with torch.no_grad():
            loss = run()
        is_loss_broken = not bool(torch.isfinite(loss).all())
    except Exception:  # noqa: BLE001 - the fault itself; the engine has its own record of it
        is_loss_broken = True
    finally:
        for hook in hooks:
            hook.remove()
    for found in (origins, carriers):
        if found:
            return Origin(module=found[0], phase="forward")
    return Origin(module=None, phase="loss" if is_loss_broken else None)
