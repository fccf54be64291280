"""What a skipped step must undo: buffers and random state."""

import operator
from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_LARGE = 2**16  # entries; statistics of a norm are never so many
_MARKS_WITH_A_LOOK = 2  # some modules register buffers when they first run


@dataclass(slots=True)
class _Kept:
    """A large buffer, and what it held when its version was this one."""

    buffer: torch.Tensor
    version: int
    copy: torch.Tensor


class Rollback:
    """Remember buffers and random state at a window's start.

    Buffers are found by name, so that one that a module assigns anew, instead of changing it in
    place, is put back too. Copies are made at every mark, since BatchNorm changes its statistics
    without moving their version counter. Large buffers of other modules (tables, quantised
    weights) are copied once, to main memory, and again only when their version has moved.

    Args:
        model: The model; its buffers (BatchNorm statistics, counters) are copied.
        device: Device whose random state is kept beside the CPU's.
        base: Where copies of large buffers may be there already; None to make all of them.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, *, base: Self | None = None
    ) -> None:
        self._model = model
        self._device = device
        self._places: list[tuple[nn.Module, str]] = []
        self._num_marks = 0
        self._buffers: list[torch.Tensor | None] = []
        self._small: list[torch.Tensor] = []
        self._large: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self._kept: dict[int, _Kept] = {} if base is None else dict(base._kept)  # noqa: SLF001 - its own kind
        self._random: list[torch.Tensor] = []
        self._random_of: dict[int, list[torch.Tensor]] = {}

    def mark(self) -> None:
        """Remember the state as it is now."""
        if self._num_marks < _MARKS_WITH_A_LOOK:
            self._num_marks += 1
            self._places = _places(self._model)
        before, self._buffers = self._buffers, self._present()
        if len(before) != len(self._buffers) or not all(map(operator.is_, before, self._buffers)):
            self._sort()
            self._copies = [torch.empty_like(buffer) for buffer in self._small]
        if any(c.shape != b.shape for c, b in zip(self._copies, self._small, strict=True)):
            self._copies = [torch.empty_like(buffer) for buffer in self._small]
        _copy(self._copies, self._small)
        for buffer in self._large:
            kept = self._kept.get(id(buffer))
            if kept is None or kept.buffer is not buffer or kept.version != buffer._version:  # noqa: SLF001 - no public name
                copy = buffer.detach().to("cpu", copy=True)
                self._kept[id(buffer)] = _Kept(buffer, buffer._version, copy)  # noqa: SLF001 - as above
        self._random = self._random_state()
        self._random_of.clear()

    def mark_micro_batch(self, position: int, *, is_first: bool) -> None:
        """Remember the random state that a micro-batch starts from; the first has the window's."""
        self._random_of[position] = self._random if is_first else self._random_state()

    def restore_buffers(self) -> None:
        """Put the buffers back, to the bit."""
        for (module, name), buffer in zip(self._places, self._buffers, strict=True):
            if module._buffers.get(name) is not buffer:  # noqa: SLF001 - the only way to it by name
                module._buffers[name] = buffer  # noqa: SLF001 - as above
        _copy(self._small, self._copies)
        with torch.no_grad():
            for kept in map(self._kept.__getitem__, map(id, self._large)):
                if kept.buffer._version != kept.version:  # noqa: SLF001 - as above
                    kept.buffer.copy_(kept.copy)
                    kept.version = kept.buffer._version  # noqa: SLF001 - as above

    def restore_random_state(self, position: int | None = None) -> None:
        """Put the random state back, that of the window or of one of its micro-batches."""
        state = self._random if position is None else self._random_of.get(position, self._random)
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)

    def _present(self) -> list[torch.Tensor | None]:
        return [module._buffers.get(name) for module, name in self._places]  # noqa: SLF001 - as above

    def _sort(self) -> None:
        self._small, self._large = [], []
        for (module, _), buffer in zip(self._places, self._buffers, strict=True):
            # Nobody can write into an expanded one.
            if buffer is not None and torch._debug_has_internal_overlap(buffer) != 1:  # noqa: SLF001 - no public name
                (self._large if _is_large(module, buffer) else self._small).append(buffer)

    def _random_state(self) -> list[torch.Tensor]:
        if self._device.type == "cuda":
            return [torch.get_rng_state(), torch.cuda.get_rng_state(self._device)]
        return [torch.get_rng_state()]


def notes_on_buffers(model: nn.Module) -> list[str]:
    """Say what the copies of large buffers take in main memory, where that is 1 MiB or more."""
    size = sum(
        buffer.numel() * buffer.element_size()
        for module, name in _places(model)
        if (buffer := module._buffers[name]) is not None and _is_large(module, buffer)  # noqa: SLF001 - by name
    )
    if size < 2**20:
        return []
    note = f"large buffers are kept a second time in main memory, {size / 2**20:.0f} MiB more"
    return [f"{note}, so that a skipped step can be undone"]


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module in model.modules() for name in module._buffers]  # noqa: SLF001 - by name


def _is_large(module: nn.Module, buffer: torch.Tensor) -> bool:
    has_version = not buffer.is_inference()
    return buffer.numel() > _LARGE and has_version and not isinstance(module, _NormBase)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
