"""Saved states: whether one and an engine go together, and the buffers torch leaves out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from stability_search.settings.engine import EngineSettings

_MUST_BE_EQUAL = ("optimizer", "precision", "norm")


def check_state(state: Mapping[str, Any], model: nn.Module, settings: EngineSettings) -> None:
    """Refuse a state that the engine could not go on from.

    Args:
        state: What `GuardedEngine.state_dict` returned.
        model: The engine's model.
        settings: The engine's settings.

    Raises:
        ValueError: Says what must be equal and is not.
    """
    if "settings" not in state:
        raise ValueError("state: it must be what GuardedEngine.state_dict returned, but is not.")
    saved = state["settings"]
    for name in _MUST_BE_EQUAL:
        ours = getattr(settings, name)
        if saved[name] != ours:
            raise ValueError(
                f"state: it must come from an engine of the same {name}, but {name} was "
                f"{saved[name]} there and is {ours} here."
            )
    if settings.optimizer == "sgd" and (saved["momentum"] > 0) != (settings.momentum > 0):
        raise ValueError(
            "state: momentum must be on or off in both, but it was "
            f"{saved['momentum']:g} there and is {settings.momentum:g} here."
        )
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in state["model"].items()}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"state: it must come from the same model, but {name} has shape "
                f"{theirs.get(name)} there and {ours.get(name)} here."
            )


def unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that modules leave out of their own `state_dict`, by name."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def put_buffers(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give a model copies of buffers that `unsaved_buffers` returned.

    Args:
        model: May lack some of them: it may register them when it first runs.
        buffers: By name; they come to the device of the model's first parameter.
    """
    device = next(model.parameters()).device
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        module.register_buffer(leaf, value.detach().clone().to(device), persistent=False)
