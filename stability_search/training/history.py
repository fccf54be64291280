"""What a long training has shown so far: kept in every checkpoint, drawn, and told at the end."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from stability_search.records.step import StepLabel, StepRecord

_MAX_BAD_STEPS = 5_000  # marks in a picture; beyond them it shows nothing more
NUM_FIRST_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPoint:
    """One finished epoch.

    Attributes:
        epoch: Its number, from 1.
        phase: The phase it ended in.
        step: The attempted step it ended with.
        num_steps: Attempted steps in it.
        num_skipped: How many of them changed no parameter, the search for a loss scale left out.
        loss: Mean finite training loss; None if there was none.
        grad_norm: Mean finite gradient norm before clipping; None if there was none.
        probe_loss: Mean loss on the probe at its end; None where not finite.
        metrics: The task's metrics at its end, a mean over the probe.
        learning_rate: Of its last step.
        scale: Loss scale of its last step; None without loss scaling.
    """

    epoch: int
    phase: int
    step: int
    num_steps: int
    num_skipped: int
    loss: float | None
    grad_norm: float | None
    probe_loss: float | None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    learning_rate: float
    scale: float | None

    @property
    def values(self) -> dict[str, float | None]:
        """What an expected course is compared with."""
        return {"loss": self.loss, "grad_norm": self.grad_norm, **self.metrics}


@dataclass(kw_only=True, slots=True)
class History:
    """Counts and curves of a long training.

    Attributes:
        epochs: Every finished epoch.
        labels: Steps so far by label.
        bad_steps: The first 5,000 `bad` steps.
        first_losses: Losses of the first ten steps.
        first_norms: Gradient norms of the first ten steps.
        first_skipped: Steps of the first ten that changed no parameter.
        start_probe: Mean probe loss before the first step; None where not finite.
        num_idle_steps: Last steps in a row that changed no parameter, the search for a loss scale
            left out.
        num_alarms_in_epoch: Alarms so far in the present epoch.
        num_calm_epochs: Epochs in a row, since the training was last taken up with other
            settings or a wait for calm, in which no alarm rose.
    """

    epochs: list[EpochPoint] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=lambda: {str(one): 0 for one in StepLabel})
    bad_steps: list[int] = field(default_factory=list)
    first_losses: list[float | None] = field(default_factory=list)
    first_norms: list[float | None] = field(default_factory=list)
    first_skipped: int = 0
    start_probe: float | None = None
    num_idle_steps: int = 0
    num_alarms_in_epoch: int = 0
    num_calm_epochs: int = 0

    def add_step(self, record: StepRecord) -> None:
        """Take in one attempted step."""
        self.labels[record.label] += 1
        if record.label is StepLabel.BAD and len(self.bad_steps) < _MAX_BAD_STEPS:
            self.bad_steps.append(record.step)
        if record.is_applied:
            self.num_idle_steps = 0
        elif record.label is not StepLabel.CALIBRATION:
            self.num_idle_steps += 1
        if record.step <= NUM_FIRST_STEPS:
            self.first_losses.append(record.loss)
            self.first_norms.append(record.grad_norm)
            self.first_skipped += not record.is_applied

    def add_epoch(self, point: EpochPoint) -> None:
        """Take in one finished epoch, after its last step and that step's alarms."""
        self.epochs.append(point)
        self.num_calm_epochs = 0 if self.num_alarms_in_epoch else self.num_calm_epochs + 1
        self.num_alarms_in_epoch = 0

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Build the history again from what `state_dict` returned."""
        epochs = [EpochPoint(**point) for point in state["epochs"]]
        return cls(**{**state, "epochs": epochs, "labels": dict(state["labels"])})
