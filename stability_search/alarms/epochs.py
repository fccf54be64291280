"""What is counted anew in every epoch, and what is said of one that has ended."""

import sys
from dataclasses import dataclass, field

from stability_search.records.values import finite_or_none

NUM_EPOCHS = 50  # of a run whose `epoch_steps` is not given
_LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochSummary:
    """A finished epoch in four numbers.

    Attributes:
        epoch: Its number, from 1.
        num_steps: Attempted steps; fewer than `epoch_steps` if it was ended early.
        loss: Mean finite loss; None if there was none.
        grad_norm: Mean finite gradient norm before clipping; None if there was none.
        num_skipped: Steps that changed no parameter, the search for a loss scale left out.
    """

    epoch: int
    num_steps: int
    loss: float | None
    grad_norm: float | None
    num_skipped: int


def epoch_line(summary: EpochSummary) -> str:
    """Say how an epoch went in one line for the log.

    Example:
        >>> epoch_line(EpochSummary(epoch=3, num_steps=9, loss=9.5, grad_norm=2.25, num_skipped=1))
        'epoch 3: loss 9.5, grad_norm 2.25, 1 of 9 steps skipped'
    """
    loss, norm = (
        "NaN or Inf" if value is None else f"{value:.4g}"
        for value in (summary.loss, summary.grad_norm)
    )
    return (
        f"epoch {summary.epoch}: loss {loss}, grad_norm {norm}, "
        f"{summary.num_skipped} of {summary.num_steps} steps skipped"
    )


@dataclass(kw_only=True, slots=True)
class Mean:
    """A running mean that stays finite."""

    count: int = 0
    mean: float = 0.0

    def add(self, value: float | None) -> None:
        """Take in a number; None is left out."""
        number = finite_or_none(value)
        if number is None:
            return
        self.count += 1
        # A sum could overflow; a convex combination does so by rounding at most.
        mean = self.mean * ((self.count - 1) / self.count) + number / self.count
        self.mean = max(-_LARGEST, min(_LARGEST, mean))

    @property
    def value(self) -> float | None:
        """The mean; None if there was no number."""
        return self.mean if self.count else None


@dataclass(kw_only=True, slots=True)
class Epoch:
    """What is counted anew in every epoch."""

    number: int = 1
    num_steps: int = 0
    num_bad: int = 0
    num_skipped: int = 0
    loss: Mean = field(default_factory=Mean)
    grad_norm: Mean = field(default_factory=Mean)
    risen: list[str] = field(default_factory=list)
