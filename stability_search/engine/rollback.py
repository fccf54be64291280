"""What a skipped step must undo: buffers and random state."""

import torch
from torch import nn


class Rollback:
    """Remember buffers and random state at a window's start.

    Args:
        model: The model; its buffers (BatchNorm statistics, counters) are copied.
        device: Device whose random state is kept beside the CPU's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._buffers = list(model.buffers())
        self._copies = [buffer.detach().clone() for buffer in self._buffers]
        self._device = device
        self._random: list[torch.Tensor] = []

    def mark(self) -> None:
        """Remember the state as it is now."""
        if self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)
        self._random = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._random.append(torch.cuda.get_rng_state(self._device))

    def restore_buffers(self) -> None:
        """Put the buffers back, to the bit."""
        if self._buffers:
            with torch.no_grad():
                torch._foreach_copy_(self._buffers, self._copies)

    def restore_random_state(self) -> None:
        """Put the random state back."""
        torch.set_rng_state(self._random[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._random[1], self._device)
