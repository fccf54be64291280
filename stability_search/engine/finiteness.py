"""Whether parameters and optimizer state are finite, asked after every update."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_TURNS = 16
_SMALL = 4096


class StateWatch:
    """Read whether parameters and second moments are finite, as one number.

    Nothing else of an optimizer's state can be non-finite while both are finite: a broken
    momentum breaks its parameter in the same update. A broken second moment does not, it only
    stops its parameter; but finite gradients, whose squares are finite too, cannot break one, so
    a sixteenth of them is read in each turn.

    Args:
        parameters: Those of the optimizer.
        optimizer: Its state is looked at where it has second moments.
    """

    def __init__(
        self, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        # Of many small tensors a copy is cheaper than a kernel for each.
        small: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.numel() <= _SMALL:
                small.setdefault(parameter.dtype, []).append(parameter)
        self._small = list(small.values())
        self._large = [p for p in parameters if p.numel() > _SMALL]

    def norm(self, turn: int) -> torch.Tensor:
        """Return the L2 norm over all of them, 0-d; not finite if any value is.

        Args:
            turn: Which second moments are read, any integer.
        """
        states = map(self._optimizer.state.get, self._parameters[turn % _TURNS :: _TURNS])
        moments = [state["exp_avg_sq"] for state in states if state and "exp_avg_sq" in state]
        joined = [torch._C._nn.flatten_dense_tensors(group) for group in self._small]  # noqa: SLF001
        norms = torch._foreach_norm([*joined, *self._large, *moments])  # noqa: SLF001 - as above
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


class StatisticsWatch:
    """Read whether the running statistics of BatchNorm and its like are finite.

    A finite loss can leave them infinite (the variance of large values), and nothing would ever
    bring them back.

    Args:
        model: Its norms are looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module._buffers, name)  # noqa: SLF001 - by name: a module may assign it anew
            for module in model.modules()
            if isinstance(module, _NormBase)
            for name in ("running_mean", "running_var")
            if module._buffers.get(name) is not None  # noqa: SLF001 - as above
        ]
        self._zeros = torch.empty(0)

    def judged(self) -> torch.Tensor | None:
        """Return 0 if all are finite, else NaN, 0-d float32; None if there are none."""
        if not self._places:
            return None
        found = [b for buffers, name in self._places if (b := buffers[name]) is not None]
        if not all(buffer.dtype is torch.float32 for buffer in found):
            found = [buffer.float() for buffer in found]
        joined = torch._C._nn.flatten_dense_tensors(found)  # noqa: SLF001 - no public name
        if self._zeros.shape != joined.shape or self._zeros.device != joined.device:
            self._zeros = torch.zeros_like(joined)
        return torch.dot(joined, self._zeros)


def state_fault(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[str, str | None]:
    """Say what of parameters and optimizer state is not finite.

    Asked once the norm of `StateWatch` is not finite, which huge finite values are enough for.

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
