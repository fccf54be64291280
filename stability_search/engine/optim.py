"""The optimizer of a configuration and the learning rate of each step.

Optimizers are built fused: the update is skipped on the device when `found_inf` is set, so that
the host learns of it with everything else at the window's end.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

ParameterGroups = Iterable[Mapping[str, Any]]

_DEFAULT_WEIGHT_DECAY = {"adamw": 1e-2, "adam": 0.0, "sgd": 0.0}  # PyTorch's own
_FUSED_DEVICES = {"cpu", "cuda"}


def build_optimizer(groups: ParameterGroups, settings: EngineSettings) -> torch.optim.Optimizer:
    """Build the fused optimizer that the settings name.

    Args:
        groups: Parameter groups as `torch.optim` takes them. A group may set `weight_decay`,
            `betas`, `eps` or `momentum` of its own, but not `lr`.
        settings: Optimizer, rates and decay.

    Raises:
        UsageError: No parameter is trainable, or a group sets `lr`.
    """
    listed = [{**group, "params": _trainable(group["params"])} for group in groups]
    listed = [group for group in listed if group["params"]]
    if not listed:
        raise UsageError(
            "model: at least one parameter must be trainable, but none requires a gradient.",
            hint="Unfreeze what should be trained.",
        )
    if any("lr" in group for group in listed):
        raise UsageError(
            "parameter_groups: a group must not set `lr`, because learning_rate is searched.",
            hint="Leave `lr` out.",
        )
    decay = settings.weight_decay
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": _DEFAULT_WEIGHT_DECAY[settings.optimizer] if decay is None else decay,
        "fused": all(_can_fuse(p) for group in listed for p in group["params"]),
    }
    if settings.optimizer == "sgd":
        return _build_sgd(listed, settings, common)
    build = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return build(listed, betas=(settings.beta1, settings.beta2), eps=settings.eps, **common)


def _trainable(parameters: Any) -> list[Any]:  # noqa: ANN401 - one tensor, many, or named ones
    listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    return [p for p in listed if (p[1] if isinstance(p, tuple) else p).requires_grad]


def _can_fuse(parameter: "torch.Tensor | tuple[str, torch.Tensor]") -> bool:
    tensor = parameter[1] if isinstance(parameter, tuple) else parameter
    return tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES


def _build_sgd(
    groups: list[dict[str, Any]], settings: EngineSettings, common: dict[str, Any]
) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, momentum=settings.momentum, **common)
    if settings.momentum > 0:
        # A first step that is skipped would leave torch's lazily made buffers uninitialised;
        # from zeros the first buffer is the first gradient, exactly as in torch.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                optimizer.state[parameter]["momentum_buffer"] = buffer
    return optimizer


def default_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return one group with every parameter of the model."""
    return [{"params": list(model.parameters())}]


def learning_rate_at(num_applied: int, settings: EngineSettings) -> float:
    """Compute the learning rate of the next update.

    Args:
        num_applied: Updates applied so far; skipped steps do not move the schedule.
        settings: Peak rate, warm-up and schedule over `num_planned_steps`.

    Returns:
        The rate, in [0, learning_rate]. Warm-up step k of W uses k/W of the peak; a linear or
        cosine schedule then reaches 0 just after the last planned step.

    Example:
        >>> settings = EngineSettings(learning_rate=1.0, warmup_steps=4, num_planned_steps=8)
        >>> [learning_rate_at(k, settings) for k in (0, 3, 7)]
        [0.25, 1.0, 1.0]
    """
    warmup = settings.warmup_steps
    if num_applied < warmup:
        return settings.learning_rate * (num_applied + 1) / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    span = max(1, settings.num_planned_steps - warmup)
    left = max(0.0, 1.0 - (num_applied - warmup) / span)
    if settings.schedule == "linear":
        return settings.learning_rate * left
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
