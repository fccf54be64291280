"""What the settings change in a model before its first step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

NUM_GROUPS = 8  # groups of a GroupNorm that replaces a BatchNorm, or the largest divisor below
_HALF = {torch.float16, torch.bfloat16}
_MIB = 2**20


def prepare_model(
    model: nn.Module, settings: EngineSettings, *, init_gain_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Change the model as the settings say, in place.

    Args:
        model: The model, on its device.
        settings: `norm`, `init_gain` and `gradient_checkpointing` are used.
        init_gain_names: Parameters that `init_gain` multiplies; None for every trainable one of
            two or more dimensions.

    Returns:
        What a reader of the log should know, one sentence each.

    Raises:
        UsageError: The model has nothing that a setting could act on.
    """
    notes = list(_keep_master_weights(model))
    if settings.norm == "group":
        _replace_batch_norm(model)
    if settings.init_gain != 1.0:
        _apply_init_gain(model, settings.init_gain, init_gain_names)
    if settings.gradient_checkpointing:
        _checkpoint_blocks(model)
    return tuple(notes)


def _keep_master_weights(model: nn.Module) -> list[str]:
    halves = [p for p in model.parameters() if p.requires_grad and p.dtype in _HALF]
    if not halves:
        return []
    extra_mib = sum(p.numel() * 2 for p in halves) / _MIB
    dtype = str(halves[0].dtype).removeprefix("torch.")
    for parameter in halves:
        parameter.data = parameter.data.float()
    return [
        f"{len(halves)} trainable parameters were stored in {dtype}; they are kept as fp32 "
        f"master weights, {extra_mib:.1f} MiB more (frozen ones stay as they are)"
    ]


def _apply_init_gain(model: nn.Module, gain: float, names: Sequence[str] | None) -> None:
    parameters = dict(model.named_parameters())
    if names is None:
        chosen = [p for p in parameters.values() if p.requires_grad and p.dim() > 1]
    else:
        unknown = sorted(set(names) - set(parameters))
        if unknown:
            raise UsageError(
                f"init_gain_parameters: every name must be a parameter of the model, but got "
                f"{', '.join(unknown)}.",
                hint="Compare with the names of model.named_parameters().",
            )
        chosen = [parameters[name] for name in names]
    if not chosen:
        raise UsageError("init_gain: the model has no weight matrix to multiply.")
    with torch.no_grad():
        for parameter in chosen:
            parameter.mul_(gain)


def _replace_batch_norm(model: nn.Module) -> None:
    num_replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - no public base
                setattr(parent, name, _group_norm(child))
                num_replaced += 1
    if num_replaced == 0:
        raise UsageError(
            "norm: `group` replaces BatchNorm, but the model has none.", hint="Leave it at keep."
        )


def _group_norm(batch_norm: nn.modules.batchnorm._BatchNorm) -> nn.GroupNorm:
    channels = batch_norm.num_features
    groups = next(n for n in range(NUM_GROUPS, 0, -1) if channels % n == 0)
    group_norm = nn.GroupNorm(groups, channels, eps=batch_norm.eps, affine=batch_norm.affine)
    if batch_norm.affine:
        # The very parameters, so that ties, names and trainability survive.
        group_norm.weight, group_norm.bias = batch_norm.weight, batch_norm.bias
    return group_norm


def _checkpoint_blocks(model: nn.Module) -> None:
    enable: Callable[[], None] | None = getattr(model, "gradient_checkpointing_enable", None)
    if callable(enable):
        enable()
        return
    blocks = [
        block
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for block in module
    ]
    outer = [block for block in blocks if not any(_holds(other, block) for other in blocks)]
    if not outer:
        raise UsageError(
            "gradient_checkpointing: the model has no nn.ModuleList or nn.Sequential of blocks.",
            hint="Give it a gradient_checkpointing_enable() method, or leave the setting off.",
        )
    for block in outer:
        block.forward = functools.partial(_checkpointed, block.forward)  # type: ignore[method-assign]


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return outer is not inner and any(module is inner for module in outer.modules())


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def largest_absolute(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the largest absolute value, 0-d float32; NaN or Inf if any value is."""
    norms = torch._foreach_norm(list(parameters), math.inf)  # noqa: SLF001 - no public name
    return torch.stack([norm.float() for norm in norms]).amax()
