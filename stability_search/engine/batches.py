"""Batches of any shape: the tensors in them, and how they reach a device."""

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Self

import torch


def tensors(
    batch: Any,  # noqa: ANN401 - a batch is the task's own
    path: str = "batch",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor of a nest of tuples, lists, dicts, dataclasses and plain objects.

    Args:
        batch: The nest; it may hold itself.
        path: Name of the nest itself, for example `batch`.

    Yields:
        Where the tensor is, for example `batch[0]['frames']`, and the tensor.
    """
    yield from _tensors(batch, path, ())


def _tensors(
    nest: Any,  # noqa: ANN401 - as above
    path: str,
    outer: tuple[int, ...],
) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(nest, torch.Tensor):
        yield path, nest
        return
    if id(nest) in outer:
        return
    for name, value in _members(nest):
        yield from _tensors(value, f"{path}{name}", (*outer, id(nest)))


def _members(nest: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - as above
    if isinstance(nest, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in nest.items())
    elif isinstance(nest, (list, tuple)):
        yield from ((f"[{index}]", value) for index, value in enumerate(nest))
    elif dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        yield from (
            (f".{spec.name}", getattr(nest, spec.name)) for spec in dataclasses.fields(nest)
        )
    elif hasattr(nest, "__dict__") and not callable(nest) and not inspect.ismodule(nest):
        yield from ((f".{key}", value) for key, value in vars(nest).items())


def move(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - a batch is the task's own
    """Return the batch with every tensor on the device; what has a `to` of its own moves itself.

    Anything else that is no tuple, list, dict or dataclass is passed on.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to") and not isinstance(batch, type):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return _moved_mapping(batch, device)
    if isinstance(batch, (list, tuple)):
        moved_items = [move(value, device) for value in batch]
        return type(batch)(*moved_items) if hasattr(batch, "_fields") else type(batch)(moved_items)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {
            spec.name: move(getattr(batch, spec.name), device)
            for spec in dataclasses.fields(batch)
            if spec.init
        }
        return dataclasses.replace(batch, **moved)
    return batch


def _moved_mapping(batch: Mapping[Any, Any], device: torch.device) -> Mapping[Any, Any]:
    moved = {key: move(value, device) for key, value in batch.items()}
    if type(batch) is dict:
        return moved
    if isinstance(batch, MutableMapping):  # a defaultdict keeps its default
        copied = copy.copy(batch)
        copied.update(moved)
        return copied
    return type(batch)(moved)  # type: ignore[call-arg]


class BatchInspector:
    """Find NaN and Inf in a batch.

    -Inf counts only in a field where the first batch had none: an additive mask is full of it.

    Args:
        first_batch: The trial's first micro-batch, on its device.
    """

    def __init__(self, first_batch: Any) -> None:  # noqa: ANN401 - a batch is the task's own
        # Kept as 0-d tensors on the device; read only when a step is non-finite.
        self._had_minus_inf: dict[str, torch.Tensor | bool] = {
            path: torch.isneginf(tensor).any()
            for path, tensor in tensors(first_batch)
            if tensor.is_floating_point()
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, bool]) -> Self:
        """Build the inspector again from what `state_dict` returned."""
        inspector = cls(None)
        inspector._had_minus_inf = dict(state)
        return inspector

    def state_dict(self) -> dict[str, bool]:
        """Return, per floating field of the first batch, whether it had -Inf."""
        return {path: bool(flag) for path, flag in self._had_minus_inf.items()}

    def fault(self, batch: Any) -> str:  # noqa: ANN401 - a batch is the task's own
        """Return what is wrong with the batch, or an empty string."""
        for path, tensor in tensors(batch):
            if tensor.is_complex() and not bool(torch.isfinite(tensor).all()):
                return f"NaN or Inf in {path}"
            if not tensor.is_floating_point():
                continue
            if bool(torch.isnan(tensor).any()):
                return f"NaN in {path}"
            if bool(torch.isposinf(tensor).any()):
                return f"Inf in {path}"
            if bool(torch.isneginf(tensor).any()) and not self._had_minus_inf.get(path, False):
                return f"-Inf in {path}"
        return ""
