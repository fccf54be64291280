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
        phase: `forward`, `loss` or `backward`; None if the fault did not show again.
    """

    module: str | None = None
    phase: str | None = None


def _is_broken(value: Any, *, counts_minus_inf: bool) -> bool:  # noqa: ANN401 - any argument
    return any(
        not bool(
            torch.isfinite(tensor).all() if counts_minus_inf else torch.isfinite(tensor.amax())
        )
        for _, tensor in batches.tensors(value)
        if tensor.is_floating_point() and tensor.numel()
    )


def trace_forward(model: nn.Module, run: Callable[[], torch.Tensor]) -> Origin:
    """Run a forward pass again and name the first module that broke.

    Args:
        model: The model whose modules are watched.
        run: The forward pass; returns the loss. What it raises is swallowed: it is the fault
            under investigation.

    Returns:
        The origin. A module that only passes on what came in broken is not named, but its phase
        is `forward` all the same.
    """
    origins: list[str] = []
    carriers: list[str] = []
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def watch(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ANN401
        # Some -Inf is no offence, since an additive mask is full of it, unless it comes out of
        # weights.
        has_weights = next(module.parameters(recurse=False), None) is not None
        if _is_broken(output, counts_minus_inf=has_weights):
            was_broken = _is_broken((args, kwargs), counts_minus_inf=has_weights)
            (carriers if was_broken else origins).append(names[module])

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
    if origins:
        return Origin(module=origins[0], phase="forward")
    if carriers:
        return Origin(phase="forward")
    return Origin(phase="loss" if is_loss_broken else None)
