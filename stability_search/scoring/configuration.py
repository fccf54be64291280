"""How stable a configuration is: its runs over seeds and learning rates, joined to S."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from stability_search.scoring.chance import beta_quantile, unit_q
from stability_search.scoring.constants import S_V1, ScoreConstants


@dataclass(frozen=True, kw_only=True, slots=True)
class StabilityScore:
    """How stable a configuration is.

    Attributes:
        score: S, 0 to 100; below .5 nothing was learned.
        q_lower: Q, a lower bound on the mean of q over seeds, in [0, 1].
        mean_margin: M, mean over the rungs of the worst mean q up to each, in [0, 1].
        margin_octaves: Doublings of the learning rate that every seed survived with q >= 1/2.
        margin_is_capped: True if that is all that were asked for: "at least so many".
        num_seeds: Seeds behind Q.
        ceiling: S that perfect seeds and rungs would give with so many seeds.
    """

    score: float
    q_lower: float
    mean_margin: float
    margin_octaves: int
    margin_is_capped: bool
    num_seeds: int
    ceiling: float


def mean_lower_bound(qs: Sequence[float], *, constants: ScoreConstants = S_V1) -> float:
    """Bound the mean of q over seeds from below: Q.

    A Beta quantile at the mean of the worse of two draws. It holds for q that vary smoothly, less
    often where seeds either work or die, and it does not bound the worse of two runs.

    Args:
        qs: q of every seed, in [0, 1]; one that is not finite counts 0.
        constants: Constants of the score.

    Returns:
        Q in [0, 1]; 0 without seeds or if all are 0. Five perfect seeds give .773.

    Example:
        >>> [round(mean_lower_bound(qs), 4) for qs in ([1] * 5, [1, 1, 1, 1, 0])]
        [0.7733, 0.3614]
    """
    ordered = sorted(unit_q(q) for q in qs)
    n = len(ordered)
    if n == 0:
        return 0.0
    c = math.fsum(q * (2 * (n - i) + 1) for i, q in enumerate(ordered, start=1)) / n**2
    if c <= 0:
        return 0.0
    c = min(c, 1.0)
    return beta_quantile(constants.lower_bound, 0.5 + n * c, 0.5 + n * (1 - c))


def stability_score(
    seed_q: Sequence[float],
    rungs: Sequence[Sequence[float] | None],
    octaves: int,
    *,
    constants: ScoreConstants = S_V1,
) -> StabilityScore:
    """Join seeds and learning-rate margin: S = 100 * Q * (1/2 + M/2).

    Args:
        seed_q: q of every seed at the configuration's own learning rate.
        rungs: q of every seed at twice the rate, at four times, ...; None or empty where a rung
            was not run, which counts 0. Those beyond `octaves` are left out.
        octaves: K, the doublings asked for, >= 0; with 0, M and the margin are 0.
        constants: Constants of the score.

    Returns:
        S and what it is made of.

    Raises:
        ValueError: `octaves` is negative.

    Example:
        >>> score = stability_score([1] * 5, [[1, 1], [0.5, 0.5], [0, 0]], 3)
        >>> round(score.score, 2), score.margin_octaves, score.margin_is_capped
        (58.0, 2, False)
    """
    if octaves < 0:
        raise ValueError(f"octaves: value >= 0 must hold, but got {octaves}.")
    worst_means: list[float] = []
    margin = 0
    worst = 1.0
    for k in range(1, octaves + 1):
        qs = [unit_q(q) for q in (rungs[k - 1] or ())] if k <= len(rungs) else []
        mean = fmean(qs) if qs else 0.0
        worst = min(worst, mean if mean >= constants.dead_q else 0.0)
        worst_means.append(worst)
        if margin == k - 1 and qs and min(qs) >= constants.alive_q:
            margin = k
    mean_margin = fmean(worst_means) if worst_means else 0.0
    q_lower = mean_lower_bound(seed_q, constants=constants)
    perfect = mean_lower_bound([1.0] * len(seed_q), constants=constants)
    return StabilityScore(
        score=100 * q_lower * (0.5 + mean_margin / 2),
        q_lower=q_lower,
        mean_margin=mean_margin,
        margin_octaves=margin,
        margin_is_capped=margin == octaves > 0,
        num_seeds=len(seed_q),
        ceiling=100 * perfect * (1.0 if octaves > 0 else 0.5),
    )
