"""Lines of the log: the level first, then the words people search their logs for."""

from collections.abc import Mapping

from stability_search.alarms.epochs import EpochSummary, epoch_line
from stability_search.records.step import StepLabel, StepRecord
from stability_search.training.history import EpochPoint

WHY_NO_PROBE = (
    "look at what model and loss do in eval mode (running statistics, a branch on `training`) and "
    "at the batches of the probe."
)


def step_line(record: StepRecord) -> str | None:
    """Say what was wrong with a step; None for one that was `ok` or looked for a loss scale."""
    if record.label in {StepLabel.OK, StepLabel.CALIBRATION}:
        return None
    parts = [f"WARNING step {record.step}: {record.label} ({record.reason})"]
    if record.first_nonfinite_module is not None:
        where = record.first_nonfinite_module or "the model itself"
        parts.append(f"first NaN or Inf in {where} ({record.first_nonfinite_phase})")
    elif record.first_nonfinite_phase is not None:
        parts.append(f"first NaN or Inf in the {record.first_nonfinite_phase}")
    if record.batch_index is not None:
        parts.append(f"batch {record.batch_index}")
    parts.append("went on without it" if record.is_applied else "step skipped")
    return ", ".join(parts)


def scale_line(record: StepRecord, after: float | None) -> str | None:
    """Say that the loss scale changed; None where it did not.

    Args:
        record: The step.
        after: The loss scale after it.
    """
    before = record.scale
    if before is None or after is None or after == before:
        return None
    change = f"loss scale {before:g} -> {after:g}"
    if after > before:
        return f"step {record.step}: {change}"
    if after < 1:
        return (
            f"CRITICAL step {record.step}: {change}, below 1: the gradient (Inf) does not fit "
            "fp16. Lower learning_rate, or leave fp16."
        )
    if record.label is StepLabel.CALIBRATION:
        return f"step {record.step}: {change} (calibration: the scale is still looked for)"
    return f"WARNING step {record.step}: {change} (gradient overflow, Inf)"


def point_line(summary: EpochSummary, point: EpochPoint) -> str:
    """Say how an epoch went, on the probe too."""
    on_probe = values_text({"loss": point.probe_loss, **point.metrics})
    return f"{epoch_line(summary)}; probe {on_probe}"


def probe_warning(point: EpochPoint) -> str:
    """Say that the probe could not be measured, whatever the training loss says."""
    return f"WARNING epoch {point.epoch}: the probe loss is NaN or Inf; {WHY_NO_PROBE}"


def values_text(values: Mapping[str, float | None]) -> str:
    """Write named numbers: `loss 1.5, error 0.2`."""
    return ", ".join(f"{name} {number_text(value)}" for name, value in values.items())


def number_text(value: float | None) -> str:
    """Write a number in four digits; None is one that was not finite."""
    return "NaN or Inf" if value is None else f"{value:.4g}"
