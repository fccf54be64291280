"""What luck alone could do: an exact test between two configurations, and bounds on a rate."""

import math
from collections.abc import Sequence

import numpy as np

_EXACT_PAIRS = 40  # two halves of 2**20 sign patterns each
_DIFFERENCE_STEPS = 4096  # resolution of q beyond that


def unit_q(q: float) -> float:
    """Return q in [0, 1]; a q that is not finite says nothing good and counts 0."""
    return min(max(q, 0.0), 1.0) if math.isfinite(q) else 0.0


def _sign_sums(differences: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the sums under every pattern of signs, 2**n of them."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate((sums - difference, sums + difference))
    return sums


def sign_flip_p(leader: Sequence[float], other: Sequence[float]) -> float:
    """Test whether the leader's q is higher than another's: exact, one-sided, paired by seed.

    Args:
        leader: q of every seed of the leader.
        other: q of the same seeds of the other, in the same order.

    Returns:
        Share of the 2**n sign patterns whose sum of differences is at least the one seen:
        1/2**n at the smallest, 1 without pairs. Beyond 40 pairs that differ, differences are
        read to 1/4096; the test of those is exact too.

    Raises:
        ValueError: The two do not have equally many seeds.
    """
    pairs = zip(leader, other, strict=True)
    differences = [
        d for a, b in pairs if (d := unit_q(a) - unit_q(b)) != 0
    ]  # flipping 0 is no flip
    n = len(differences)
    if n > _EXACT_PAIRS:
        return _sign_flip_p_of_many(differences)
    observed = math.fsum(differences)
    slack = 1e-12 * n  # a sum that ties but for rounding is at least as large
    first, second = _sign_sums(differences[: n // 2]), np.sort(_sign_sums(differences[n // 2 :]))
    num_below = np.searchsorted(second, observed - slack - first, side="left")
    return float(np.sum(second.size - num_below)) / 2.0**n


def _sign_flip_p_of_many(differences: Sequence[float]) -> float:
    """Do the same on a grid, where the distribution of the sum is a convolution."""
    steps = [round(d * _DIFFERENCE_STEPS) for d in differences]
    reach = sum(map(abs, steps))
    chances = np.zeros(2 * reach + 1)
    chances[reach] = 1.0
    for step in map(abs, steps):
        chances = (np.roll(chances, step) + np.roll(chances, -step)) / 2  # never wraps: reach
    return float(min(1.0, chances[reach + sum(steps) :].sum()))


def require_counts(num_bad: int, num_judged: int) -> None:
    """Refuse counts that cannot be.

    Raises:
        ValueError: A count is negative, or `num_bad` exceeds `num_judged`.
    """
    if not 0 <= num_bad <= num_judged:
        raise ValueError(
            f"0 <= num_bad <= num_judged must hold, but got {num_bad} and {num_judged}."
        )


def bad_rate_bound(num_bad: int, num_judged: int, *, confidence: float = 0.95) -> float:
    """Bound the rate of bad steps from above, if steps are independent.

    Args:
        num_bad: `bad` steps of all seeds together, >= 0.
        num_judged: `ok` and `bad` steps, >= num_bad.
        confidence: Chance that the bound holds, in (0, 1).

    Returns:
        A rate in [0, 1]: 3/N if none was bad (the rule of three), else the one-sided
        Clopper-Pearson bound; 1 if nothing was judged.

    Raises:
        ValueError: A count is negative, or `num_bad` exceeds `num_judged`.

    Example:
        >>> bad_rate_bound(0, 2000)
        0.0015
    """
    require_counts(num_bad, num_judged)
    if num_bad == num_judged:
        return 1.0
    if num_bad == 0:
        rule = 3.0 if confidence == 0.95 else -math.log1p(-confidence)  # noqa: PLR2004
        return min(1.0, rule / num_judged)
    return beta_quantile(confidence, num_bad + 1, num_judged - num_bad)


def beta_quantile(share: float, a: float, b: float) -> float:
    """Return the value below which a share of Beta(a, b) lies."""
    from scipy.special import betaincinv  # loads for .15 s, which no trial need wait for

    return min(max(float(betaincinv(a, b, share)), 0.0), 1.0)
