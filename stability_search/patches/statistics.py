"""Running statistics of BatchNorm: a skipped step does not undo them, so this does.

One batch of NaN would leave them NaN for good. They are copied after every good step and put back
where a bad one left NaN or Inf; what is finite stays as the forward pass has left it.
"""

import gc
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.nn.parameter import UninitializedBuffer

_NAMES = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """Copies of the running statistics of every norm in the process."""

    def __init__(self) -> None:
        self._norms: weakref.WeakSet[_NormBase] = weakref.WeakSet()
        self._copies: weakref.WeakKeyDictionary[_NormBase, list[torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )

    def put_in(self) -> Callable[[], None]:
        """Let every norm that is built from now on be known; return what ends that."""
        return register_module_buffer_registration_hook(self._was_registered).remove

    def find(self) -> None:
        """Look for norms that were built before, or copied or unpickled; copy what all hold."""
        kinds = _subclasses(_NormBase)
        # By exact type: `isinstance` would ask proxies, which may load or compute something.
        self._norms.update(thing for thing in gc.get_objects() if type(thing) in kinds)
        for norm in self._norms:
            self._copy_anew(norm)

    def copy(self) -> None:
        """Copy every statistic; to be called after a good step."""
        if not self._norms:
            return
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for norm in self._norms:
            held, copies = _buffers(norm), self._copies.get(norm)
            if copies is None or any(
                a.shape != b.shape or a.device != b.device or a.dtype is not b.dtype
                for a, b in zip(held, copies, strict=False)
            ):
                self._copy_anew(norm)
                continue
            targets += copies
            sources += held
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)

    def restore(self) -> tuple[int, int]:
        """Put back what is NaN or Inf.

        Returns:
            How many norms were put back, and how many could not be, for want of a finite copy.
        """
        num_restored = num_lost = 0
        for norm in self._norms:
            held = _buffers(norm)
            if all(map(_is_finite, held)):
                continue
            copies = self._copies.get(norm)
            if copies is None or not all(map(_is_finite, copies)):
                num_lost += 1
                continue
            for buffer, copied in zip(held, copies, strict=True):
                # A forward pass may await its backward, which has saved these and does not read
                # them: as `.data` they change without ending it.
                buffer.data.copy_(copied)
            num_restored += 1
        return num_restored, num_lost

    def _was_registered(self, module: nn.Module, _name: str, _buffer: object) -> None:
        if isinstance(module, _NormBase):
            self._norms.add(module)

    def _copy_anew(self, norm: _NormBase) -> None:
        held = _buffers(norm)
        if held:
            self._copies[norm] = [buffer.detach().clone() for buffer in held]


def _subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(_subclasses, kind.__subclasses__()))


def _buffers(norm: _NormBase) -> list[torch.Tensor]:
    held = (norm._buffers.get(name) for name in _NAMES)  # noqa: SLF001 - may be assigned anew
    return [b for b in held if b is not None and not isinstance(b, UninitializedBuffer)]


def _is_finite(buffer: torch.Tensor) -> bool:
    return bool(torch.isfinite(buffer).all())
