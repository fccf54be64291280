"""Whether parameters and optimizer state are finite, asked after every update."""

from collections.abc import Sequence

import torch
from torch import nn
from torch._utils import _flatten_dense_tensors

_MOMENT_TURNS = 16
_SMALL = 4096


def state_norm(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, turn: int
) -> torch.Tensor:
    """Return the L2 norm over parameters and second moments, 0-d; not finite if any value is.

    Nothing else of an optimizer's state can be non-finite while both are finite: a broken
    momentum breaks its parameter in the same update. A broken second moment does not, it only
    stops its parameter; but finite gradients, whose squares are finite too, cannot break one, so
    a sixteenth of them is read in each turn.

    Args:
        parameters: Those of the optimizer.
        optimizer: Its state is looked at where it has second moments.
        turn: Which of them are read, any integer.
    """
    moments = [
        state["exp_avg_sq"]
        for parameter in parameters[turn % _MOMENT_TURNS :: _MOMENT_TURNS]
        if "exp_avg_sq" in (state := optimizer.state.get(parameter, {}))
    ]
    return _norm([*parameters, *moments])


def _norm(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    # Of many small tensors a copy is cheaper than a kernel for each.
    small: dict[torch.dtype, list[torch.Tensor]] = {}
    large: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.numel() <= _SMALL:
            small.setdefault(tensor.dtype, []).append(tensor)
        else:
            large.append(tensor)
    joined = [_flatten_dense_tensors(group) for group in small.values()]  # type: ignore[no-untyped-call]
    norms = torch._foreach_norm([*joined, *large])  # noqa: SLF001 - no public name
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def state_fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str | None]:
    """Say what of parameters and optimizer state is not finite.

    Asked once `state_norm` is not finite, which huge finite values are enough for.

    Args:
        model: Where names come from.
        optimizer: Its parameters and all of its state are looked at.

    Returns:
        What is not finite, and the module it belongs to; an empty string if nothing is.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in listed:
        if not _is_finite(parameter):
            name = names.get(parameter, "outside the model")
            return f"parameter {name} became NaN or Inf", _owner(model, parameter)
    for parameter in listed:
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, torch.Tensor) and not _is_finite(value):
                name = names.get(parameter, "a parameter outside the model")
                return f"optimizer state of {name} became NaN or Inf", _owner(model, parameter)
    return "", None


def _owner(model: nn.Module, parameter: nn.Parameter) -> str | None:
    for name, module in model.named_modules():
        if any(parameter is own for own in module.parameters(recurse=False)):
            return name or type(model).__name__
    return None


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
