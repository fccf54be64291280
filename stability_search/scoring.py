"""Score S-v1: how well and how calmly a run trained, over seeds and learning rates. Pure.

One run has q = A * B * C * P; seeds give a lower bound Q on the mean of q; rungs of a learning
rate ladder give the margin; together they give S, 0 to 100. Every formula is written out in
`stability_search/README.md`. None, NaN and infinite losses may be handed in everywhere; what
comes out is finite.
"""

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median

import numpy as np

NUM_READINGS = 11  # probe readings k = 0..10, at the tenths of the horizon
LEVEL_READINGS = 3  # readings under the median that makes a level
MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LARGEST_LOG = 709.0  # exp of it is finite
_EXACT_PAIRS = 40  # two halves of 2**20 sign patterns each
_DIFFERENCE_STEPS = 4096  # resolution of q beyond that


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConstants:
    """The judgement in the score, in one place and stored with every study.

    Attributes:
        name: Version of the score. Scores of different names are never compared.
        calm_half_rate: Share of bad steps that halves A, > 0.
        smooth_half_rate: Share of spikes that halves B, > 0.
        progress_target: Share of the best progress from which on P is 1, in (0, 1]. Short runs
            flatter high learning rates, so more than this is not rewarded.
        spike_window: Finite losses before a step that it is compared with.
        spike_min_losses: Losses the window must hold before steps are judged.
        spike_z: Robust z-score of ln(loss) from which a loss exceeds.
        spike_jump_frac: Share of Delta by which it must exceed as well.
        spike_floor: Smallest spread of ln(loss); times Delta where losses are not positive.
        spike_lasting: Steps from the spike on that must exceed, of `spike_run`.
        spike_run: Steps looked at for that; as many in a row are a new level.
        lower_bound: Quantile of the Beta distribution that makes Q, in (0, 1).
        dead_q: Mean q below which a rung counts 0.
        alive_q: q from which on a run counts as stable.
    """

    name: str = "S-v1"
    calm_half_rate: float = 0.02
    smooth_half_rate: float = 0.01
    progress_target: float = 0.9
    spike_window: int = 32
    spike_min_losses: int = 8
    spike_z: float = 6.0
    spike_jump_frac: float = 0.1
    spike_floor: float = 0.01
    spike_lasting: int = 2
    spike_run: int = 3
    lower_bound: float = 0.10
    dead_q: float = 0.01
    alive_q: float = 0.5

    def __post_init__(self) -> None:
        """Keep the name S-v1 for the constants of S-v1.

        Raises:
            ValueError: A constant differs while the name is S-v1.
        """
        if self.name != "S-v1":
            return
        for spec in fields(self):
            value = getattr(self, spec.name)
            if value != spec.default:
                raise ValueError(
                    f"{spec.name}: {spec.default!r} must hold in S-v1, but got {value!r}. "
                    "Give the other constants another name."
                )


S_V1 = ScoreConstants()


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


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _unit(q: float) -> float:
    """Return q in [0, 1]; a q that is not finite says nothing good and counts 0."""
    return _clip(q) if math.isfinite(q) else 0.0


def _require_counts(num_bad: int, num_judged: int) -> None:
    if not 0 <= num_bad <= num_judged:
        raise ValueError(
            f"0 <= num_bad <= num_judged must hold, but got {num_bad} and {num_judged}."
        )


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
    _require_counts(num_bad, num_judged)
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


class _SpikeWindow:
    """The last finite losses before a step, and the test of a loss against them."""

    def __init__(self, delta: float, constants: ScoreConstants) -> None:
        self._delta = delta
        self._constants = constants
        # An exact tie is decided by rounding; the slack makes a loss at z = 6 exceed.
        self._z = constants.spike_z - 1e-9
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._recent)

    def push(self, loss: float) -> None:
        self._recent.append(loss)
        insort(self._sorted, loss)
        if len(self._recent) > self._constants.spike_window:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def restart(self, losses: Sequence[float]) -> None:
        self._recent.clear()
        self._sorted.clear()
        for loss in losses:
            self.push(loss)

    def exceeds(self, loss: float | None) -> bool:
        """Say whether a loss stands out; a non-finite one (None) does."""
        if loss is None:
            return True
        size = len(self._sorted)
        low, high = self._sorted[(size - 1) // 2], self._sorted[size // 2]
        jump = self._constants.spike_jump_frac * self._delta
        if loss <= 0 or self._sorted[0] <= 0:  # no logarithm: judged on the scale of Delta
            middle = low / 2 + high / 2
            if loss - middle < jump:
                return False
            spread = MAD_TO_SIGMA * median(abs(v - middle) for v in self._sorted)
            floor = self._constants.spike_floor * self._delta
            return loss - middle >= self._z * max(spread, floor)
        middle = (math.log(low) + math.log(high)) / 2
        if loss - math.exp(min(middle, _LARGEST_LOG)) < jump:
            return False  # the usual case, decided without the cost of the spread
        spread = MAD_TO_SIGMA * median(abs(math.log(v) - middle) for v in self._sorted)
        return math.log(loss) - middle >= self._z * max(spread, self._constants.spike_floor)


def count_spikes(
    losses: Sequence[float | None], delta: float | None, *, constants: ScoreConstants = S_V1
) -> int:
    """Count the steps at which the training loss jumped and stayed up.

    A step exceeds if its loss stands out from the last 32 finite losses before it, in the
    logarithm and by a tenth of Delta. It counts if at least 2 of the 3 steps from it on exceed,
    so that a single hard batch does not, and an excursion of L steps counts min(L - 1, 3): what
    exceeds stays out of the window, and three in a row become the new level.

    Args:
        losses: Training loss of the `ok` and `bad` steps in order; None or NaN where non-finite.
        delta: Delta, the yardstick of progress; without one that is finite and > 0 no step
            exceeds.
        constants: Constants of the score.

    Returns:
        n_spike, 0 <= n_spike <= len(losses).

    Example:
        >>> count_spikes([1.0] * 20 + [3.0, 3.0, 3.0, 3.0] + [1.0] * 5, 1.0)
        3
    """
    if delta is None or not math.isfinite(delta) or delta <= 0:
        return 0
    values = [v if v is not None and math.isfinite(v) else None for v in losses]
    window = _SpikeWindow(delta, constants)
    count = 0
    run: list[float] = []
    for position, loss in enumerate(values):
        if loss is None:  # never a spike itself; breaks a run
            run.clear()
        elif len(window) < constants.spike_min_losses:
            window.push(loss)
        elif window.exceeds(loss):
            following = values[position + 1 : position + constants.spike_run]
            count += 1 + sum(map(window.exceeds, following)) >= constants.spike_lasting
            run.append(loss)
            if len(run) == constants.spike_run:
                window.restart(run)
                run.clear()
        else:
            run.clear()
            window.push(loss)
    return count


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
    ordered = sorted(_unit(q) for q in qs)
    n = len(ordered)
    if n == 0:
        return 0.0
    c = math.fsum(q * (2 * (n - i) + 1) for i, q in enumerate(ordered, start=1)) / n**2
    if c <= 0:
        return 0.0
    c = min(c, 1.0)
    return _beta_quantile(constants.lower_bound, 0.5 + n * c, 0.5 + n * (1 - c))


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
        qs = [_unit(q) for q in (rungs[k - 1] or ())] if k <= len(rungs) else []
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
    differences = [d for a, b in pairs if (d := _unit(a) - _unit(b)) != 0]  # flipping 0 is no flip
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
    _require_counts(num_bad, num_judged)
    if num_bad == num_judged:
        return 1.0
    if num_bad == 0:
        rule = 3.0 if confidence == 0.95 else -math.log1p(-confidence)  # noqa: PLR2004
        return min(1.0, rule / num_judged)
    return _beta_quantile(confidence, num_bad + 1, num_judged - num_bad)


def _beta_quantile(share: float, a: float, b: float) -> float:
    from scipy.special import betaincinv  # loads for .15 s, which no trial need wait for

    return _clip(float(betaincinv(a, b, share)))
