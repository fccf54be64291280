"""Weights that are stored in half precision: what becomes fp32, for good or for a while.

Trainable ones become fp32 master weights: an update smaller than half a bit of fp16 would be lost.
Frozen ones stay as they are, unless nothing could be computed with them.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from stability_search.settings.engine import EngineSettings

HALF = frozenset({torch.float16, torch.bfloat16})
_MIB = 2**20
_EXTRA_BYTES = 2  # of an fp32 number beside a half one
# Autocast leaves their weights alone on a CPU, where they take inputs of their own precision
# only; on CUDA it computes them in fp32.
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def store_weights(model: nn.Module, settings: EngineSettings) -> list[str]:
    """Turn into fp32 what this configuration cannot train or compute with in half precision.

    Args:
        model: The model, changed in place: parameters stay the same objects, ties included.
        settings: In `fp32` nothing stays in half precision; otherwise frozen weights do, but
            for those of norms.

    Returns:
        What was done and what memory it costs, one sentence each.
    """
    trainable = [p for p in model.parameters() if p.requires_grad and p.dtype in HALF]
    notes = [_master_note(trainable, settings)] if trainable else []
    _widen(_buffers_beside(model, trainable))
    _widen(trainable)
    norms = [t for t in _of_norms(model) if t.dtype in HALF]
    if settings.precision != "fp32":
        _widen(norms)
    frozen = _half_tensors(model)
    if not frozen:
        return notes
    subject = f"{len(frozen)} frozen parameters and buffers"
    if settings.precision == "fp32":
        notes.append(
            f"{subject} were stored in {_dtypes(frozen)}; fp32 cannot be computed with them, so "
            f"they are kept in fp32, {_mib(frozen):.1f} MiB more"
        )
        _widen(frozen)
    else:
        exception = f" ({len(norms)} of norms are kept in fp32)" if norms else ""
        notes.append(
            f"{subject} stay in {_dtypes(frozen)}{exception}; measuring is always done in fp32, "
            f"and fp32 copies of them take {2 * _mib(frozen):.1f} MiB more meanwhile"
        )
    return notes


def keep_no_half_precision(model: nn.Module) -> nn.Module:
    """Turn every half-precision parameter and buffer into fp32, in place; return the model."""
    _widen(_half_tensors(model))
    return model


@contextlib.contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Compute with fp32 copies of half-precision weights within this context.

    The very same half-precision tensors are back afterwards, also after an exception.
    """
    stored = [(tensor, tensor.data) for tensor in _half_tensors(model)]
    try:
        _widen(tensor for tensor, _ in stored)
        yield
    finally:
        for tensor, data in stored:
            tensor.data = data


def _master_note(trainable: Sequence[torch.Tensor], settings: EngineSettings) -> str:
    is_adam = settings.optimizer != "sgd"
    num_moments = 2 if is_adam else int(settings.momentum > 0)
    extra = _mib(trainable)
    return (
        f"{len(trainable)} trainable parameters were stored in {_dtypes(trainable)}; they are "
        f"kept as fp32 master weights, {extra:.1f} MiB more, and {extra * (1 + num_moments):.1f} "
        f"MiB more for their gradients and the state of {settings.optimizer}"
    )


def _buffers_beside(model: nn.Module, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    # A BatchNorm takes statistics in the precision of its weight only.
    chosen = {id(p) for p in parameters}
    return [
        buffer
        for module in model.modules()
        if any(id(p) in chosen for p in module.parameters(recurse=False))
        for buffer in module.buffers(recurse=False)
    ]


def _half_tensors(model: nn.Module) -> list[torch.Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALF]


def _of_norms(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        if isinstance(module, _NORMS):
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)


def _widen(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()


def _mib(tensors: Sequence[torch.Tensor]) -> float:
    return sum(tensor.numel() for tensor in tensors) * _EXTRA_BYTES / _MIB


def _dtypes(tensors: Sequence[torch.Tensor]) -> str:
    return " and ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
