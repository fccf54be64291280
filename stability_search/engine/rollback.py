"""What a skipped step must undo: buffers and random state."""

import torch
from torch import nn


class Rollback:
    """Remember buffers and random state at a window's start.

    Buffers are found by name, so that one that a module assigns anew, instead of changing it in
    place, is put back too. Copies are made at every mark: BatchNorm changes its statistics
    without moving their version counter.

    Args:
        model: The model; its buffers (BatchNorm statistics, counters) are copied.
        device: Device whose random state is kept beside the CPU's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._places = [
            (module._buffers, name)  # noqa: SLF001 - the only way to a buffer by name
            for module in model.modules()
            for name in module._buffers  # noqa: SLF001 - as above
        ]
        self._device = device
        self._buffers: list[torch.Tensor | None] = []
        self._copies: list[torch.Tensor] = []
        self._random: list[torch.Tensor] = []
        self._random_of: dict[int, list[torch.Tensor]] = {}

    def mark(self) -> None:
        """Remember the state as it is now."""
        self._buffers = [buffers.get(name) for buffers, name in self._places]
        present = self._present()
        if not _can_hold(self._copies, present):
            self._copies = [torch.empty_like(buffer) for buffer in present]
        _copy(self._copies, present)
        self._random = self._random_state()
        self._random_of.clear()

    def mark_micro_batch(self, position: int, *, is_first: bool) -> None:
        """Remember the random state that a micro-batch starts from; the first has the window's."""
        self._random_of[position] = self._random if is_first else self._random_state()

    def restore_buffers(self) -> None:
        """Put the buffers back, to the bit."""
        for (buffers, name), buffer in zip(self._places, self._buffers, strict=True):
            if buffers.get(name) is not buffer:
                buffers[name] = buffer
        _copy(self._present(), self._copies)

    def restore_random_state(self, position: int | None = None) -> None:
        """Put the random state back, that of the window or of one of its micro-batches."""
        state = self._random if position is None else self._random_of.get(position, self._random)
        torch.set_rng_state(state[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state[1], self._device)

    def _present(self) -> list[torch.Tensor]:
        return [buffer for buffer in self._buffers if buffer is not None]

    def _random_state(self) -> list[torch.Tensor]:
        if self._device.type == "cuda":
            return [torch.get_rng_state(), torch.cuda.get_rng_state(self._device)]
        return [torch.get_rng_state()]


def _can_hold(copies: list[torch.Tensor], buffers: list[torch.Tensor]) -> bool:
    return len(copies) == len(buffers) and all(
        copy.shape == buffer.shape and copy.dtype == buffer.dtype and copy.device == buffer.device
        for copy, buffer in zip(copies, buffers, strict=True)
    )


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
