"""What was seen since the last optimizer step, and its one transfer to the host."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MOST_LOSSES = 256  # of backward passes without a step: more are joined


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A window on the host; numbers may be NaN or infinite here, and only here.

    Attributes:
        losses: Loss of each backward pass.
        grad_norm: L2 norm of the unscaled gradients before clipping; None if there are none.
        max_norm: What `clip_grad_norm_` was asked for; None if it was not.
        scale: Loss scale; None without a scaler.
        num_good: Good steps since the scale last changed; 0 without a scaler.
        aborted: Why a backward pass ended early (anomaly mode); empty if none did.
    """

    losses: tuple[float, ...] = ()
    grad_norm: float | None
    max_norm: float | None = None
    scale: float | None = None
    num_good: int = 0
    aborted: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClippedNorm:
    """The norm that clipping has measured.

    Attributes:
        parameters: Ids of the parameters it was measured over.
        norm: Unscaled L2 norm before clipping, 0-d.
        max_norm: Largest norm left; None where values were clipped.
    """

    parameters: frozenset[int]
    norm: torch.Tensor
    max_norm: float | None


class Window:
    """Losses and norms since the last step; they stay on their device until a step is judged.

    Attributes:
        scaler: The scaler whose scaled loss went backward; None without loss scaling.
        aborted: Why a backward pass ended early; empty if none did.
    """

    def __init__(self) -> None:
        self.scaler: torch.amp.GradScaler | None = None
        self.aborted = ""
        self._losses: list[torch.Tensor] = []
        self._clipped: list[ClippedNorm] = []
        self._is_judged = False

    def add_loss(self, loss: object, scaler: torch.amp.GradScaler | None = None) -> None:
        """Note the unscaled loss of a backward pass; of anything but one number only that it ran.

        Args:
            loss: What goes backward.
            scaler: What scaled it.
        """
        if self._is_judged:
            self.clear()
        self._clipped.clear()  # the gradients change
        if scaler is not None:
            self.scaler = scaler
        elif self.scaler is not None:
            return  # the same loss, scaled
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            return
        if len(self._losses) >= _MOST_LOSSES:
            self._losses = [torch.stack(self._losses).sum()]
        loss = loss.detach()
        self._losses.append(loss.reshape(()) if loss.dim() else loss)

    def add_clipped(self, clipped: ClippedNorm) -> None:
        """Note what clipping measured."""
        self._clipped.append(clipped)

    def close(self) -> None:
        """Say that a step was judged: what comes next belongs to the next window."""
        self._is_judged = True

    def clear(self) -> None:
        """Start a window."""
        self.scaler, self.aborted, self._is_judged = None, "", False
        self._losses.clear()
        self._clipped.clear()

    def read(self, optimizer: torch.optim.Optimizer, *, is_scaled: bool) -> Reading | None:
        """Bring the window to the host, in one transfer.

        Args:
            optimizer: Its gradients are measured, unless clipping has done so.
            is_scaled: True if they still carry the loss scale.

        Returns:
            None if there is nothing to judge: no gradient, and no backward pass that ended early.
        """
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if not parameters:
            if not self.aborted:
                return None
            return Reading(grad_norm=None, aborted=self.aborted, scale=_scale_of(self.scaler))
        clipped = self._clipped_norm(parameters)
        norm = grad_norm(parameters) if clipped is None else clipped.norm
        scale, num_good = _scale_tensors(self.scaler)
        losses = self._losses
        numbers = _to_host([*losses, norm, *scale, *num_good])
        found = numbers[len(losses)]
        value = numbers[len(losses) + 1] if scale else None
        if is_scaled and clipped is None and value:
            found /= value
        return Reading(
            losses=tuple(numbers[: len(losses)]),
            grad_norm=found,
            max_norm=None if clipped is None else clipped.max_norm,
            scale=value,
            num_good=int(numbers[-1]) if num_good else 0,
            aborted=self.aborted,
        )

    def _clipped_norm(self, parameters: Sequence[torch.Tensor]) -> ClippedNorm | None:
        if not self._clipped:
            return None
        wanted = set(map(id, parameters))
        return next((c for c in self._clipped if wanted <= c.parameters), None)


def grad_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of gradients, 0-d; not finite if any value is not.

    Args:
        parameters: Each with a gradient.
    """
    with torch.no_grad():
        gradients = [_values(p.grad) for p in parameters if p.grad is not None]
        # A norm beyond 65504 is no overflow of the gradients.
        wide = torch.float32 if any(g.dtype is torch.float16 for g in gradients) else None
        norms = torch._foreach_norm(gradients, 2, dtype=wide)  # noqa: SLF001 - no public name
        total: torch.Tensor = torch.linalg.vector_norm(_joined(norms))
        return total


def _values(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _joined(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack numbers of any device and type; float64 only where one of them needs it."""
    first = numbers[0]
    if all(n.dtype is first.dtype and n.device == first.device for n in numbers):
        return torch.stack(tuple(numbers))
    is_double = any(n.dtype is torch.float64 for n in numbers)
    dtype = torch.float64 if is_double else torch.float32
    return torch.stack([n.to(device=first.device, dtype=dtype) for n in numbers])


def _to_host(numbers: Sequence[torch.Tensor]) -> list[float]:
    found: list[float] = _joined(numbers).tolist()
    return found


def _scale_tensors(
    scaler: torch.amp.GradScaler | None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the scale and its count of good steps, each in a list; empty without them."""
    if scaler is None:
        return [], []
    # The public getters would each wait for the device.
    scale, count = scaler._scale, scaler._growth_tracker  # noqa: SLF001 - see above
    return [] if scale is None else [scale], [] if count is None else [count]


def _scale_of(scaler: torch.amp.GradScaler | None) -> float | None:
    return None if scaler is None else scaler.get_scale()
