"""How one run did: q, the product of four factors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stability_search.scoring.chance import require_counts
from stability_search.scoring.constants import S_V1, ScoreConstants

NUM_READINGS = 11  # probe readings k = 0..10, at the tenths of the horizon
LEVEL_READINGS = 3  # readings under the median that makes a level


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScore:
    """How one trial did; every factor in [0, 1], higher is better.

    Attributes:
        q: Run score, the product of the four factors.
        calm: A, few bad steps.
        smooth: B, few lasting jumps of the loss.
        kept: C, kept what it had gained.
        progress: P, share of the best known progress, full from 90 % on.
        num_spikes: Lasting jumps of the training loss.
    """

    q: float
    calm: float
    smooth: float
    kept: float
    progress: float
    num_spikes: int = 0


ZERO_RUN = RunScore(q=0.0, calm=0.0, smooth=0.0, kept=0.0, progress=0.0)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def calm_factor(num_bad: int, num_judged: int, *, half_rate: float = 0.02) -> float:
    """Say how calmly a trial stepped: A, halved by every `half_rate` of bad steps.

    Args:
        num_bad: `bad` steps of the trial, >= 0.
        num_judged: `ok` and `bad` steps, >= num_bad; `calibration` and `data` are left out.
        half_rate: Bad share of the steps that halves the factor, > 0. Raise it to forgive more;
            changing it means a new score version.

    Returns:
        A in [0, 1], higher is better; 0 if nothing was judged.

    Raises:
        ValueError: A count is negative, or `num_bad` exceeds `num_judged`.

    Example:
        >>> calm_factor(4, 200)
        0.5
    """
    require_counts(num_bad, num_judged)
    return 2.0 ** (-(num_bad / num_judged) / half_rate) if num_judged else 0.0


def probe_levels(probes: Sequence[float | None]) -> tuple[float, ...]:
    """Smooth the probe: each level is the median of three readings in a row.

    Args:
        probes: Up to 11 readings k = 0..10; None, NaN or missing at the end count as +inf.

    Returns:
        Nine levels, k = 2..10. The last is E_T, the smallest E_min; either may be +inf.

    Raises:
        ValueError: There are more than 11 readings.
    """
    if len(probes) > NUM_READINGS:
        raise ValueError(f"probes: at most {NUM_READINGS} readings, but got {len(probes)}.")
    values = [p if p is not None and math.isfinite(p) else math.inf for p in probes]
    values += [math.inf] * (NUM_READINGS - len(values))
    return tuple(
        sorted(values[k - LEVEL_READINGS + 1 : k + 1])[LEVEL_READINGS // 2]
        for k in range(LEVEL_READINGS - 1, NUM_READINGS)
    )


def score_run(  # noqa: PLR0913 - the raw inputs of the formula, all by keyword
    *,
    num_ok: int,
    num_bad: int,
    num_spikes: int,
    probes: Sequence[float | None],
    e0: float | None,
    delta: float | None,
    are_parameters_finite: bool = True,
    constants: ScoreConstants = S_V1,
) -> RunScore:
    """Score a run that reached its horizon: q = A * B * C * P.

    A run that was stopped, ran out of memory or timed out has q = 0: the caller says so.

    Args:
        num_ok: `ok` steps, >= 0.
        num_bad: `bad` steps, >= 0.
        num_spikes: Lasting jumps of the training loss, see `count_spikes`.
        probes: The 11 probe readings; None or NaN where non-finite.
        e0: E_0, the probe loss that counts as no progress.
        delta: E_0 - E*, the best known progress. Without an E_0, and a Delta that is finite and
            > 0, every factor is 0.
        are_parameters_finite: False if a parameter ended NaN or infinite.
        constants: Constants of the score.

    Returns:
        q and its factors, each in [0, 1]; all 0 if no step was judged.

    Raises:
        ValueError: A count is negative, or there are more than 11 readings.

    Example:
        >>> probes = [3.0, *[1.0] * 10]
        >>> score_run(num_ok=196, num_bad=4, num_spikes=0, probes=probes, e0=3.0, delta=2.0).q
        0.5
    """
    for name, value in (("num_ok", num_ok), ("num_bad", num_bad), ("num_spikes", num_spikes)):
        if value < 0:
            raise ValueError(f"{name}: value >= 0 must hold, but got {value}.")
    levels = probe_levels(probes)
    num_judged = num_ok + num_bad
    if num_judged == 0 or e0 is None or not math.isfinite(e0):
        return ZERO_RUN
    if delta is None or not math.isfinite(delta) or delta <= 0:
        return ZERO_RUN
    calm = calm_factor(num_bad, num_judged, half_rate=constants.calm_half_rate)
    smooth = 2.0 ** (-(num_spikes / num_judged) / constants.smooth_half_rate)
    kept = progress = 0.0
    e_t, e_min = levels[-1], min(levels)
    if math.isfinite(e_t):  # then the smallest is finite too
        progress = _clip(((e0 - e_t) / delta) / constants.progress_target)
        last = probes[-1] if len(probes) == NUM_READINGS else None
        if last is not None and math.isfinite(last) and last < e0 and are_parameters_finite:
            kept = 1.0 - _clip((e_t - e_min) / delta)
    return RunScore(
        q=calm * smooth * kept * progress,
        calm=calm,
        smooth=smooth,
        kept=kept,
        progress=progress,
        num_spikes=num_spikes,
    )
