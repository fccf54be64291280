"""Gradient overflows once the loss scale was found."""

from dataclasses import dataclass, field

from stability_search.records.step import PROOF_STEPS, StepLabel, StepRecord

RECENT_STEPS = 200  # steps over which a share or the rate of overflows is taken


@dataclass(kw_only=True, slots=True)
class OverflowCount:
    """What the alarm and a summary count of them.

    Bad data counts for nothing, neither as a step nor as an overflow.

    Attributes:
        num_ok: `ok` steps so far; after 20 the scale counts as found.
        num_steps: Steps since then.
        num_overflows: How many of those overflowed.
        recent: Which of the last 200 did.
    """

    num_ok: int = 0
    num_steps: int = 0
    num_overflows: int = 0
    recent: list[int] = field(default_factory=list)

    def add(self, record: StepRecord) -> bool:
        """Take in a step; return True if it counts as an overflow."""
        if record.scale is None or record.label is StepLabel.DATA:
            return False
        is_found = self.num_ok >= PROOF_STEPS
        self.num_ok += record.label is StepLabel.OK
        if not is_found:
            return False
        self.num_steps += 1
        self.recent = [step for step in self.recent if step > self.num_steps - RECENT_STEPS]
        if record.is_grad_finite:
            return False
        self.num_overflows += 1
        self.recent.append(self.num_steps)
        return True

    @property
    def rate(self) -> float | None:
        """Overflows per step; None before the loss scale was found."""
        return self.num_overflows / self.num_steps if self.num_steps else None
