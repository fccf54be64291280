"""What one optimizer has been through: its steps, their labels, its alarms."""

import math
import sys
from collections import Counter
from collections.abc import Sequence

from stability_search.alarms.alarm import Alarm
from stability_search.alarms.epochs import EpochSummary
from stability_search.alarms.watch import AlarmWatch
from stability_search.engine.guards import ScaleProof, StepFacts, label_step
from stability_search.patches.window import Reading
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.alarms import AlarmSettings, OnAlarm

_ENDLESS = 50 * sys.maxsize  # an epoch ends with its data, not by a count


class Course:
    """The steps of one optimizer.

    Args:
        number: Which optimizer of the process it is, from 1.
        kind: Name of its class.
        alarms: Thresholds.
        is_observed: True if a step is taken whatever its label is.

    Attributes:
        epoch: The present one, from 1.
        step: Attempted steps so far.
        num_bad_in_a_row: `bad` and `data` steps since the last good one.
        counts: Steps by label.
        proof: Which loss scales are known to work.
        last: The last step; None before the first.
    """

    def __init__(
        self,
        number: int,
        kind: str,
        alarms: AlarmSettings,
        *,
        is_observed: bool = False,
    ) -> None:
        self.number = number
        self.kind = kind
        self.is_observed = is_observed
        self.epoch = 1
        self._finished: EpochSummary | None = None
        self.step = 0
        self.num_bad_in_a_row = 0
        self.counts: Counter[StepLabel] = Counter()
        self.proof = ScaleProof()
        self.last: StepRecord | None = None
        self._watch = AlarmWatch(alarms, num_planned_steps=_ENDLESS)
        self._has_own_epoch = alarms.epoch_steps is not None

    def judge(
        self,
        reading: Reading,
        *,
        learning_rate: float,
        loss_decides: bool,
        batch_fault: str,
        batch_index: int | None,
    ) -> StepRecord:
        """Label one attempt at a step.

        Args:
            reading: What was measured.
            learning_rate: The rate it uses.
            loss_decides: True if a non-finite loss makes a step `bad` whose gradients are finite.
            batch_fault: What is wrong with its batch; only heard if the step is not finite.
            batch_index: Which batch that was.
        """
        self.step += 1
        norm = reading.grad_norm
        grad_fault = "" if norm is None else _fault("gradient", [norm])
        # A batch that the script itself gave up may have left its loss here: while the gradients
        # are finite only the last one counts.
        heard = reading.losses if grad_fault else reading.losses[-1:] if loss_decides else ()
        forward_fault = reading.aborted or _fault("loss", heard)
        label, reason = label_step(
            StepFacts(
                state_fault="",
                batch_fault=batch_fault,
                forward_fault=forward_fault,
                grad_fault=grad_fault,
                scale=reading.scale,
                proven_scale=self.proof.proven_scale,
            )
        )
        is_ok = label is StepLabel.OK
        are_losses_finite = all(map(math.isfinite, reading.losses))
        record = StepRecord(
            step=self.step,
            label=label,
            reason=reason,
            loss=_mean(reading.losses) if are_losses_finite else None,
            is_loss_finite=are_losses_finite,
            grad_norm=None if norm is None or grad_fault else norm,
            is_grad_finite=not grad_fault,
            clipped=not grad_fault and _is_clipped(reading),
            # PyTorch's own scaler skips an overflow, whoever watches.
            is_applied=is_ok
            or (self.is_observed and not (grad_fault and reading.scale is not None)),
            learning_rate=learning_rate,
            scale=reading.scale,
            batch_index=batch_index if batch_fault and not is_ok else None,
        )
        self._count(record)
        return record

    def see(self, record: StepRecord) -> tuple[Sequence[Alarm], OnAlarm | None]:
        """Return the alarms of a step, and what they ask for."""
        found = self._watch.see(record)
        self._note_epoch()
        return found, self._watch.must_end

    def epoch_holds(self, num_batches: int) -> None:
        """Say how many batches the present epoch holds, of which a share may then be judged."""
        if not self._has_own_epoch:
            self._watch.epoch_steps = num_batches

    def end_epoch(self) -> Sequence[Alarm]:
        """End the epoch with its data, unless the settings count its steps; return its alarms."""
        if self._has_own_epoch:
            return ()
        self._watch.finished_epoch = None
        found = self._watch.end_epoch()
        self._note_epoch()
        return found

    def take_finished_epoch(self) -> EpochSummary | None:
        """Return the epoch that ended since this was last asked; None if none did."""
        finished, self._finished = self._finished, None
        return finished

    def _note_epoch(self) -> None:
        finished = self._watch.finished_epoch
        if finished is not None:
            self._finished = finished
            self.epoch += 1

    @property
    def num_skipped(self) -> int:
        """Steps that NaN or Inf has cost, the search for a loss scale left out."""
        return self.counts[StepLabel.BAD] + self.counts[StepLabel.DATA]

    def _count(self, record: StepRecord) -> None:
        self.last = record
        self.counts[record.label] += 1
        if record.label in (StepLabel.BAD, StepLabel.DATA):
            self.num_bad_in_a_row += 1
        elif record.label is StepLabel.OK:
            self.num_bad_in_a_row = 0
        if record.scale is None:
            return
        if record.label is StepLabel.OK:
            self.proof.step_was_ok(record.scale)
        elif record.label is StepLabel.BAD and record.is_loss_finite:
            self.proof.overflow_was_bad(record.scale)


def _fault(what: str, numbers: Sequence[float]) -> str:
    if all(map(math.isfinite, numbers)):  # nearly always
        return ""
    if any(map(math.isnan, numbers)):
        return f"{what} is NaN"
    return f"{what} is Inf"


def _mean(numbers: Sequence[float]) -> float | None:
    if not numbers:
        return None
    mean = sum(numbers) / len(numbers)
    return mean if math.isfinite(mean) else None


def _is_clipped(reading: Reading) -> bool:
    if reading.grad_norm is None or reading.max_norm is None:
        return False
    return reading.grad_norm > reading.max_norm
