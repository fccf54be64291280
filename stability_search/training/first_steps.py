"""The verdict on the first steps, which people watch before they leave a run alone."""

from collections.abc import Sequence
from statistics import fmean

from stability_search.training.history import NUM_FIRST_STEPS, History
from stability_search.training.wording import WHY_NO_PROBE

_CALM_NORM = 1.0  # a healthy gradient norm, of teams who watched theirs; it depends on the model


def first_steps_line(history: History) -> str:
    """Say whether the loss falls, the gradient norm is calm and steps are taken.

    The means of the first and the last five steps are compared: one step says little.

    Args:
        history: Of ten steps or more, of which the first ten count.
    """
    half = NUM_FIRST_STEPS // 2
    early, late = _mean(history.first_losses[:half]), _mean(history.first_losses[half:])
    falls = early is not None and late is not None and late < early
    norm, skipped = _mean(history.first_norms), history.first_skipped
    calm = "NaN or Inf" if norm is None else f"{norm:.4g}"
    if norm is not None:
        calm += f" ({'below' if norm < _CALM_NORM else 'not below'} {_CALM_NORM:g})"
    facts = (
        f"loss {_shown(early)} to {_shown(late)} ({'falls' if falls else 'does not fall'}), "
        f"grad_norm {calm}, {skipped} of {NUM_FIRST_STEPS} skipped"
    )
    is_lost = skipped > half or norm is None or late is None
    if history.start_probe is None:
        facts += ", the probe loss of the untrained model is NaN or Inf"
        if not is_lost:
            return f"WARNING first {NUM_FIRST_STEPS} steps: {facts}: {WHY_NO_PROBE}"
    if not is_lost and falls:
        return f"first {NUM_FIRST_STEPS} steps: {facts}: healthy so far"
    advice = (
        "Stop and look at the data, the precision and learning_rate."
        if is_lost
        else "Watch it: a warm-up may need longer, a learning_rate may be too high."
    )
    return f"WARNING first {NUM_FIRST_STEPS} steps: {facts}. {advice}"


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None]
    return fmean(finite) if finite else None


def _shown(value: float | None) -> str:
    return "NaN or Inf" if value is None else f"{value:.4g}"
