"""The steps of synthetic trials, as their step files would hold them."""

import math
from collections.abc import Callable, Sequence

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import TrialRow
from tests.study_rows import StudyCase

ReadSteps = Callable[[str], Sequence[StepRecord]]


def steps_of(row: TrialRow, *, text: str = "loss is NaN") -> list[StepRecord]:
    """Return the attempted steps of a trial: what its summary counts, from the first bad one on.

    Args:
        row: The trial.
        text: Reason, module and phase of every bad step.
    """
    summary, is_scaled = row.summary, row.settings["precision"] == "fp16"
    begin = summary.first_bad_step or 0
    bad = set(range(begin, begin + summary.num_bad_steps)) if begin else set()
    searched = set(range(1, summary.num_calibration_steps + 1))
    scale, records = 65536.0, []
    for step in range(1, summary.num_steps + 1):
        is_bad = step in bad
        label = StepLabel.CALIBRATION if step in searched else StepLabel.OK
        label = StepLabel.BAD if is_bad else label
        if label is not StepLabel.OK:
            scale = max(1.0, scale / 2)
        records.append(
            StepRecord(
                step=step,
                label=label,
                reason=text if is_bad else "",
                loss=None if is_bad else 3.0 * math.exp(-step / 80),
                is_loss_finite=not is_bad,
                grad_norm=None if label is not StepLabel.OK else 0.5 + 2 / step,
                is_grad_finite=label is StepLabel.OK,
                clipped=row.settings["clip_norm"] is not None and step % 3 == 0,
                is_applied=label is StepLabel.OK,
                learning_rate=float(row.settings["learning_rate"]),
                scale=scale if is_scaled else None,
                attention_max=None if is_bad else 20.0 + step,
                batch_index=step if is_bad else None,
                first_nonfinite_module=text if is_bad else None,
                first_nonfinite_phase=text if is_bad else None,
                last_finite_max=6e4 if is_bad else None,
                evidence=0.9**step * 60.0 ** sum(one <= step for one in bad),
            )
        )
    return records


def reader_of(case: StudyCase, *, text: str = "loss is NaN") -> ReadSteps:
    """Return what reads the steps of any trial of a study."""
    # Tables write lone surrogates out; only a hostile trial has any in its name.
    rows = {r.trial_id.encode("utf-8", "backslashreplace").decode(): r for r in case.rows}

    def read(trial_id: str) -> list[StepRecord]:
        return steps_of(rows[trial_id], text=text)

    return read
