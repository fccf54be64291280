"""Batches of any shape: the tensors in them, and how they reach a device."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def tensors(batch: Any, path: str = "batch") -> Iterator[tuple[str, torch.Tensor]]:  # noqa: ANN401
    """Yield every tensor of a nest of tuples, lists, dicts, dataclasses and plain objects.

    Args:
        batch: The nest.
        path: Name of the nest itself, for example `batch`.

    Yields:
        Where the tensor is, for example `batch[0]['frames']`, and the tensor.
    """
    if isinstance(batch, torch.Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors(value, f"{path}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for index, value in enumerate(batch):
            yield from tensors(value, f"{path}[{index}]")
    elif hasattr(batch, "__dict__") and not isinstance(batch, type):
        for key, value in vars(batch).items():
            yield from tensors(value, f"{path}.{key}")
    elif dataclasses.is_dataclass(batch):
        for spec in dataclasses.fields(batch):
            yield from tensors(getattr(batch, spec.name), f"{path}.{spec.name}")


def move(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - a batch is the task's own
    """Return the batch with every tensor on the device; anything else is passed on."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return type(batch)({key: move(value, device) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = {
            spec.name: move(getattr(batch, spec.name), device)
            for spec in dataclasses.fields(batch)
        }
        return dataclasses.replace(batch, **moved)
    return batch


class BatchInspector:
    """Find NaN and Inf in a batch.

    -Inf counts only in a field where the first batch had none: an additive mask is full of it.

    Args:
        first_batch: The trial's first micro-batch, on its device.
    """

    def __init__(self, first_batch: Any) -> None:  # noqa: ANN401 - a batch is the task's own
        # Kept as 0-d tensors on the device; read only when a step is non-finite.
        self._had_minus_inf = {
            path: torch.isneginf(tensor).any()
            for path, tensor in tensors(first_batch)
            if tensor.is_floating_point()
        }

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
            if bool(torch.isneginf(tensor).any()) and not self._allows_minus_inf(path):
                return f"-Inf in {path}"
        return ""

    def _allows_minus_inf(self, path: str) -> bool:
        flag = self._had_minus_inf.get(path)
        return flag is not None and bool(flag)
