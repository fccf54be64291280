"""The same seeds in both runs, their q on one yardstick, and an exact test of the difference.

q is measured on the yardstick of its own study, and two studies hardly ever have the same one:
whichever found the lower probe loss hands out less progress for the same training. Compared as
they stand, one and the same training would differ on every seed, always in one direction. So the
trials are scored again, from the rows in their step files, with the E_0 and the E* of both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stability_search.comparison.sides import Measure, Row, Side
from stability_search.errors import UsageError
from stability_search.scoring.chance import sign_flip_p
from stability_search.standing import score_trial
from stability_search.step_files import read_row
from stability_search.yardstick import Yardstick

LEVEL = 0.05
"""Chance of seeing a difference between equals that the words of a test go by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One seed that both configurations were confirmed on.

    Attributes:
        seed: The seed.
        first: q of the first run's configuration, in [0, 1].
        second: q of the second's.
    """

    seed: int
    first: float
    second: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedTest:
    """What the seeds in common show.

    Attributes:
        pairs: One or more, in the order of the first run's seeds.
        mean_difference: Mean of first minus second, in [-1, 1].
        p_value: Exact two-sided p of the sign-flip test on these differences, in (0, 1].
        least_p: The smallest that so many pairs can give, 2/2**n, at most 1.
        e0: E_0 that q is measured with.
        delta: Delta that q is measured with.
    """

    pairs: tuple[Pair, ...]
    mean_difference: float
    p_value: float
    least_p: float
    e0: float
    delta: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """A test, or why there is none.

    Attributes:
        test: What the seeds in common show; None where nothing can be tested.
        why_not: Why there is no test, a sentence; empty where there is one.
        lost: Trials of a seed in common that were left out, a sentence each.
    """

    test: PairedTest | None = None
    why_not: str = ""
    lost: tuple[str, ...] = ()


def two_sided_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Test whether q differs: exact, two-sided, paired by seed.

    Args:
        first: q of every seed of one configuration, each in [0, 1].
        second: q of the same seeds of the other, in the same order.

    Returns:
        Share of the 2**n sign patterns whose sum of differences lies at least as far from 0 as
        the one seen: 2/2**n at the smallest, 1 without pairs.

    Raises:
        ValueError: The two do not have equally many seeds.

    Source:
        Exact paired permutation test; `scoring.chance.sign_flip_p` is its one-sided half.

    Example:
        >>> two_sided_p([0.9, 0.9, 0.9, 0.9, 0.9], [0.5, 0.6, 0.7, 0.8, 0.8])
        0.0625
    """
    # The sums are symmetric about 0, so both tails weigh the same; at 0 they overlap.
    return min(1.0, 2 * min(sign_flip_p(first, second), sign_flip_p(second, first)))


def pair_up(first: Side, second: Side) -> Pairing:
    """Test the two configurations of the verdicts on the seeds they have in common.

    Args:
        first: A run.
        second: Another that it can be compared with.
    """
    for side, name in ((first, "A"), (second, "B")):
        if not side.confirmed:
            what = "no configuration to compare" if side.headline is None else "no confirm trial"
            return Pairing(why_not=f"{name} has {what}.")
    seeds = [seed for seed in first.confirmed if seed in second.confirmed]
    if not seeds:
        return Pairing(
            why_not="The two have no seed in common: study seeds "
            f"{first.space.study.seed} and {second.space.study.seed}. "
            "Run one again with the seed of the other."
        )
    measure = _common(first.measure, second.measure)
    if measure is None:
        return Pairing(why_not="One of the two yardsticks has no signal: q is 0 whatever was run.")
    pairs, lost = [], []
    for seed in seeds:
        try:
            q = [_q(side, seed, measure) for side in (first, second)]
        except UsageError as error:
            lost.append(error.message)
            continue
        pairs.append(Pair(seed=seed, first=q[0], second=q[1]))
    if not pairs:
        return Pairing(why_not="No seed in common could be scored again.", lost=tuple(lost))
    return Pairing(test=_tested(pairs, measure), lost=tuple(lost))


def have_one_measure(first: Side, second: Side) -> bool:
    """Say whether q and S of both runs stand on the same yardstick."""
    return _scale(first.measure) == _scale(second.measure)


def _scale(measure: Measure) -> tuple[float | None, float | None]:
    return measure.e0, measure.delta


def _tested(pairs: Sequence[Pair], measure: Measure) -> PairedTest:
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    assert measure.e0 is not None  # noqa: S101 - `_common` saw to it
    assert measure.delta is not None  # noqa: S101 - likewise
    return PairedTest(
        pairs=tuple(pairs),
        mean_difference=math.fsum(differences) / len(pairs),
        p_value=two_sided_p(first, second),
        least_p=min(1.0, 2.0 ** (1 - len(pairs))),
        e0=measure.e0,
        delta=measure.delta,
    )


def _common(first: Measure, second: Measure) -> Measure | None:
    """Return the yardstick of both studies together: the smaller E_0, the lower E*."""
    if _scale(first) == _scale(second):
        return first if first.e0 is not None and first.delta is not None else None
    if None in (first.e0, second.e0, first.e_star, second.e_star, first.delta, second.delta):
        return None
    e0 = min(first.e0 or 0.0, second.e0 or 0.0)
    e_star = min(first.e_star or 0.0, second.e_star or 0.0)
    if not 0 < e0 - e_star < math.inf:
        return None
    return Measure(
        e0=e0,
        e0_source=first.e0_source,
        e_star=e_star,
        delta=e0 - e_star,
        sigma=max(first.sigma, second.sigma),
    )


def _q(side: Side, seed: int, measure: Measure) -> float:
    """Return q of one confirm trial on a yardstick; UsageError where its row is not at hand."""
    row = side.confirmed[seed]
    if _scale(side.measure) == _scale(measure):
        return float(row["q"])
    path = side.run.step_file(row["trial_id"], attempt=row["attempt"])
    try:
        stored = read_row(path)
        is_same = (stored.trial_id, stored.attempt, stored.seed, stored.config_id) == (
            row["trial_id"],
            row["attempt"],
            seed,
            row["config_id"],
        )
        score = score_trial(stored, _yardstick(measure, side.horizon)) if is_same else None
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: its row cannot be scored: {error}.") from error
    if score is None:
        raise UsageError(f"{path}: it is not the step file of {_name(row)}.")
    return score.q


def _yardstick(measure: Measure, horizon: int) -> Yardstick:
    return Yardstick(
        horizon=horizon,
        e0=measure.e0,
        e0_source="",
        e_star=measure.e_star,
        delta=measure.delta,
        sigma=measure.sigma,
        has_signal=True,
    )


def _name(row: Row) -> str:
    return f"{row['trial_id']}, attempt {row['attempt']}"
