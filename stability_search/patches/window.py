"""What was seen since the last optimizer step, and its one transfer to the host."""

import weakref
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
        is_unscaled: False if nobody knows, as with the gradients of a mixed window.
    """

    parameters: frozenset[int]
    norm: torch.Tensor
    max_norm: float | None
    is_unscaled: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScaling:
    """The loss scaling of one optimizer.

    Attributes:
        scaler: Its scaler.
        is_scaled: True if the gradients still carry the loss scale.
    """

    scaler: torch.amp.GradScaler
    is_scaled: bool


class Window:
    """Losses and norms since the last step; they stay on their device until a step is judged.

    Attributes:
        scaler: The scaler whose scaled loss went backward; None without loss scaling.
        aborted: Why a backward pass ended early; empty if none did.
        is_in_backward: True during a backward pass, in which checkpointing starts further ones.
    """

    def __init__(self) -> None:
        self.scaler: torch.amp.GradScaler | None = None
        self.aborted = ""
        self.is_in_backward = False
        self._losses: list[torch.Tensor] = []
        self._clipped: list[ClippedNorm] = []
        self._scaled: list[weakref.ref[torch.Tensor]] = []
        self._last: weakref.ref[torch.Tensor] | None = None
        self._has_unscaled = False
        self._is_judged = False

    @property
    def is_mixed(self) -> bool:
        """True if not all that went backward was scaled."""
        return self.scaler is not None and self._has_unscaled

    def losses(self) -> tuple[float, ...]:
        """Bring the losses alone to the host: those of the window that is not judged yet."""
        return () if self._is_judged or not self._losses else tuple(_to_host(self._losses))

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
        elif any(scaled() is loss for scaled in self._scaled):
            return  # the same loss, scaled
        else:
            self._has_unscaled = True
            if self.scaler is not None:
                return  # it may be made of a scaled one
        if not isinstance(loss, torch.Tensor):
            return
        self._last = weakref.ref(loss)
        if loss.numel() != 1:
            return
        if len(self._losses) >= _MOST_LOSSES:
            self._losses = [torch.stack(self._losses).sum()]
        loss = loss.detach()
        self._losses.append(loss.reshape(()) if loss.dim() else loss)

    def add_scaled(self, scaled: torch.Tensor) -> None:
        """Remember what a scaler made of a loss, which goes backward in its place."""
        self._scaled = [known for known in self._scaled if known() is not None]
        self._scaled.append(weakref.ref(scaled))

    def reaches(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return True if the last loss is still there and depends on a parameter of this one."""
        loss = None if self._last is None else self._last()
        if loss is None or loss.grad_fn is None:
            return False
        wanted = {id(p) for group in optimizer.param_groups for p in group["params"]}
        waiting, seen = [loss.grad_fn], {loss.grad_fn}
        while waiting:
            node = waiting.pop()
            if id(getattr(node, "variable", None)) in wanted:
                return True
            following = {n for n, _ in node.next_functions if n is not None} - seen
            seen |= following
            waiting += following
        return False

    def add_clipped(self, clipped: ClippedNorm) -> None:
        """Note what clipping measured."""
        self._clipped.append(clipped)

    def close(self) -> None:
        """Say that a step was judged: what comes next belongs to the next window."""
        self._is_judged = True

    def clear(self) -> None:
        """Start a window."""
        self.scaler, self.aborted, self._is_judged = None, "", False
        self._last, self._has_unscaled = None, False
        self._losses.clear()
        self._clipped.clear()

    def read(
        self, optimizer: torch.optim.Optimizer, scaling: LossScaling | None
    ) -> Reading | None:
        """Bring the window to the host, in one transfer.

        Args:
            optimizer: Its gradients are measured, unless clipping has done so.
            scaling: Its loss scaling; None without.

        Returns:
            None if there is nothing to judge: no gradient, and no backward pass that ended early.
        """
        parameters = [
            p for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        if not parameters:
            if not self.aborted:
                return None
            scale = None if scaling is None else scaling.scaler.get_scale()
            return Reading(grad_norm=None, aborted=self.aborted, scale=scale)
        clipped = self._clipped_norm(parameters)
        norm = grad_norm(parameters) if clipped is None else clipped.norm
        scales, num_good = _scale_tensors(None if scaling is None else scaling.scaler)
        losses = self._losses
        numbers = _to_host([*losses, norm, *scales, *num_good])
        found = numbers[len(losses)]
        value = numbers[len(losses) + 1] if scales else None
        is_unscaled = clipped is not None and clipped.is_unscaled
        if scaling is not None and scaling.is_scaled and value and not is_unscaled:
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
