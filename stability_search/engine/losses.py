"""A loss as tasks return it, and the exceptions that stand for a numerical failure."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from stability_search.records.values import finite_or_none

LossFn = Callable[[nn.Module, Any], "torch.Tensor | Mapping[str, torch.Tensor]"]
NUMERICAL_ERRORS = (FloatingPointError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def total_loss(
    result: "torch.Tensor | Mapping[str, torch.Tensor]",
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Sum the named terms of a loss.

    Args:
        result: What a `LossFn` returned: a tensor of one element, or a dict of them.

    Returns:
        The loss, 0-d float32, and its terms; no terms where they have no names.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(result, torch.Tensor) and not result.dim() and result.dtype is torch.float32:
        return result, {}  # nothing to convert: the usual case
    terms = result if isinstance(result, Mapping) else {"loss": result}
    if not terms:
        raise ValueError("loss: it must be a 0-d tensor or a dict of them, but got {}.")
    for value in terms.values():
        _require_single(value)
    if not isinstance(result, Mapping):
        return result.reshape(()).float(), {}
    return torch.stack([term.reshape(()).float() for term in terms.values()]).sum(), terms


def _require_single(value: object) -> None:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return
    got = type(value).__name__
    if isinstance(value, torch.Tensor):
        got = f"shape {tuple(value.shape)}"
    raise ValueError(f"loss: it must be a 0-d tensor or a dict of them, but got {got}.")


def mean_terms(terms: Mapping[int, Mapping[str, float]]) -> dict[str, float | None]:
    """Average named loss terms over the micro-batches of a window; None where not finite."""
    names = {name: None for row in terms.values() for name in row}
    return {
        name: finite_or_none(sum(row.get(name, 0.0) for row in terms.values()) / len(terms))
        for name in names
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for every way torch says that memory ran out, the CPU's included."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
