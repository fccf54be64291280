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
from stability_search.settings.engine import EngineSettings

ParameterGroups = Iterable[Mapping[str, Any]]

# `name` is a label of the user's own; `param_names` is what torch makes of named parameters.
_GROUP_KEYS = frozenset(
    {
        *(
            "params",
            "param_names",
            "name",
            "weight_decay",
            "betas",
            "eps",
            "momentum",
            "dampening",
        ),
        *("nesterov", "amsgrad", "maximize"),
    }
)

_DEFAULT_WEIGHT_DECAY = {"adamw": 1e-2, "adam": 0.0, "sgd": 0.0}  # PyTorch's own
_FUSED_DEVICES = {"cpu", "cuda"}


def checked_groups(
    groups: ParameterGroups, model: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Return the groups with what can be trained in them.

    Args:
        groups: Parameter groups as `torch.optim` takes them, or bare parameters. A group may set
            `weight_decay`, `betas`, `eps`, `momentum`, `nesterov`, `dampening`, `amsgrad` or
            `maximize` of its own, but not `lr`.
        model: Where every parameter of the groups must come from; None to leave that unchecked.

    Raises:
        UsageError: No parameter is trainable, a group sets `lr` or something unknown, or its
            parameters are not those of the model, each once.
    """
    listed = [_checked_group(group) for group in _as_groups(groups)]
    listed = [group for group in listed if group["params"]]
    if not listed:
        raise UsageError(
            "model: at least one parameter must be trainable, but none requires a gradient.",
            hint="Unfreeze what should be trained.",
        )
    _check_parameters(listed, model)
    return listed


def build_optimizer(groups: ParameterGroups, settings: EngineSettings) -> torch.optim.Optimizer:
    """Build the fused optimizer that the settings name.

    Args:
        groups: As `checked_groups` takes them.
        settings: Optimizer, rates and decay.

    Raises:
        UsageError: As `checked_groups`, or torch refuses a value of a group.
    """
    listed = checked_groups(groups)
    decay = settings.weight_decay
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "weight_decay": _DEFAULT_WEIGHT_DECAY[settings.optimizer] if decay is None else decay,
        "fused": all(_can_fuse(p) for group in listed for p in group["params"]),
    }
    try:
        if settings.optimizer == "sgd":
            return _with_state(torch.optim.SGD(listed, momentum=settings.momentum, **common))
        build = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        betas = (settings.beta1, settings.beta2)
        return _with_state(build(listed, betas=betas, eps=settings.eps, **common))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"parameter_groups: torch.optim must accept them, but said: {error}.",
            hint="Give groups as torch.optim takes them.",
        ) from error


def _as_groups(groups: ParameterGroups) -> list[Mapping[str, Any]]:
    listed: list[Any] = list(groups)
    is_group = [isinstance(group, Mapping) for group in listed]
    return listed if all(is_group) else [{"params": listed}]


def _checked_group(group: Mapping[str, Any]) -> dict[str, Any]:
    if "params" not in group:
        raise UsageError(
            f"parameter_groups: a group must have `params`, but one has {', '.join(group)}.",
            hint="Give groups as torch.optim takes them.",
        )
    if "lr" in group:
        raise UsageError(
            "parameter_groups: a group must not set `lr`, because learning_rate is searched.",
            hint="Leave `lr` out.",
        )
    unknown = sorted(set(group) - _GROUP_KEYS)
    if unknown:
        # torch would keep it and do nothing with it.
        raise UsageError(
            f"parameter_groups: a group may set {', '.join(sorted(_GROUP_KEYS))}, but one sets "
            f"{', '.join(unknown)}.",
            hint="Leave it out.",
        )
    return {**group, "params": _trainable(group["params"])}


def _check_parameters(groups: list[dict[str, Any]], model: nn.Module | None) -> None:
    seen: set[int] = set()
    known = None if model is None else {id(p) for p in model.parameters()}
    for parameter in (_tensor(p) for group in groups for p in group["params"]):
        if known is not None and id(parameter) not in known:
            raise UsageError(
                "parameter_groups: every parameter must be one of the model, but one of shape "
                f"{tuple(parameter.shape)} is not.",
                hint="Take them from the model that is given, and make outside ones part of it.",
            )
        if id(parameter) in seen:
            raise UsageError(
                "parameter_groups: each parameter must stand in one group once, but one of shape "
                f"{tuple(parameter.shape)} stands there twice.",
                hint="A tied weight has two names and is one parameter.",
            )
        seen.add(id(parameter))


def _trainable(parameters: Any) -> list[Any]:  # noqa: ANN401 - one tensor, many, or named ones
    listed = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for parameter in map(_tensor, listed):
        if not isinstance(parameter, torch.Tensor):
            raise UsageError(
                f"parameter_groups: `params` must be tensors, but one is {parameter!r}.",
                hint="Give the parameters, not their names.",
            )
    return [p for p in listed if _tensor(p).requires_grad]


def _tensor(parameter: "torch.Tensor | tuple[str, torch.Tensor]") -> torch.Tensor:
    return parameter[1] if isinstance(parameter, tuple) else parameter


def _can_fuse(parameter: "torch.Tensor | tuple[str, torch.Tensor]") -> bool:
    tensor = _tensor(parameter)
    return tensor.is_floating_point() and tensor.device.type in _FUSED_DEVICES


def _with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make the state that torch makes at the first step, so that a skipped one leaves no trace.

    A first step that is skipped would also leave torch's momentum uninitialised; from zeros the
    first one is the first gradient, exactly as in torch.
    """
    for group in optimizer.param_groups:
        names = [] if "betas" not in group else ["exp_avg", "exp_avg_sq"]
        names += ["max_exp_avg_sq"] if group.get("amsgrad") else []
        names += ["momentum_buffer"] if group.get("momentum") else []
        for parameter in group["params"] if names else ():
            state = optimizer.state[parameter]
            if "betas" in group:
                device = parameter.device if group["fused"] else torch.device("cpu")
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in names:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return optimizer


def check_schedule(settings: EngineSettings) -> None:
    """Refuse a schedule that has no steps to run over.

    Raises:
        UsageError: The planned steps end with the warm-up, or were not given.
    """
    if settings.schedule != "constant" and settings.num_planned_steps <= max(
        1, settings.warmup_steps
    ):
        raise UsageError(
            f"schedule: num_planned_steps > warmup_steps must hold for {settings.schedule}, but "
            f"got {settings.num_planned_steps} and {settings.warmup_steps}.",
            hint="Say in num_planned_steps how long training is, or keep the schedule constant.",
        )


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
