"""What one step shows as named numbers, for every tool that draws curves."""

import re

from stability_search.records.step import StepLabel, StepRecord

_UNSAFE = re.compile(r"[^A-Za-z0-9_\-. ]")
_MAX_NAME = 100


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Return the numbers of one step by tag; what was not finite or not measured is left out.

    Example:
        >>> record = StepRecord(
        ...     step=1, label=StepLabel.BAD, loss=None, is_loss_finite=False, grad_norm=2.0,
        ...     is_grad_finite=True, clipped=False, is_applied=False, learning_rate=0.1,
        ...     scale=None, loss_terms={"ctc/a": 1.5},
        ... )
        >>> step_scalars(record)
        {'train/grad_norm': 2.0, 'train/learning_rate': 0.1, 'train/is_bad': 1.0, \
'loss_terms/ctc_a': 1.5}
    """
    values: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/learning_rate": record.learning_rate,
        "train/loss_scale": record.scale,
        "train/attention_max": record.attention_max,
        "train/evidence": record.evidence,
        "train/is_bad": float(record.label is StepLabel.BAD),
        **{f"loss_terms/{safe_name(name)}": value for name, value in record.loss_terms.items()},
    }
    return {tag: value for tag, value in values.items() if value is not None}


def safe_name(name: str) -> str:
    """Return a task's own name as part of a tag that every tool takes.

    Example:
        >>> safe_name("../ctc loss"), safe_name("..")
        ('_ctc loss', '_')
    """
    return _UNSAFE.sub("_", name).strip(". ")[:_MAX_NAME] or "_"
