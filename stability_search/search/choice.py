"""Which of the configurations that meet the bar to train with, and how sure that is.

Statistics decide as little as five seeds allow: a winner is named only where an exact paired
test separates it from every other. Testing again as seeds come in would void the test, so there
are at most two looks, and both are fixed before the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from stability_search.records.verdict import ChoiceReason
from stability_search.scoring.chance import sign_flip_p
from stability_search.scoring.constants import S_V1
from stability_search.search.candidates import learning_rate_of
from stability_search.standing import ConfigurationStanding

ALPHA_ONE_LOOK = 0.05
ALPHA_TWO_LOOKS = 0.025  # at each of the two
TIED_SHARE = 0.8  # of the leader's S, from which a configuration is as good as the leader
CLOSE_Q = 0.02  # mean q this close needs no second look: more seeds would show no difference
MIN_SEEDS = 5  # 1/2**5 is the first p below .05


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What one look showed.

    Attributes:
        chosen: What to train with.
        reason: Whether it won, is one of a tied set, or is the only one.
        tied: The tied set, best score first; empty unless `reason` is `tied`.
        num_seeds: Seeds that the paired tests had, >= 0.
        is_close: True if the two best scores differ by .02 or less in mean q.
    """

    chosen: ConfigurationStanding
    reason: ChoiceReason
    tied: tuple[ConfigurationStanding, ...] = ()
    num_seeds: int
    is_close: bool = True


def _paired(standing: ConfigurationStanding, seeds: Sequence[int]) -> list[float]:
    by_seed = dict(zip(standing.seed_indices, standing.q, strict=True))
    return [by_seed[seed] for seed in seeds]


def by_score(standings: Sequence[ConfigurationStanding]) -> list[ConfigurationStanding]:
    """Sort by S, then margin, then the lowest learning rate, then `config_id`; best first."""
    return sorted(
        standings,
        key=lambda one: (
            -one.score.score,
            -one.score.margin_octaves,
            learning_rate_of(one.settings),
            one.config_id,
        ),
    )


def choose(
    standings: Sequence[ConfigurationStanding],
    *,
    alpha: float,
    dropped_seeds: frozenset[int] = frozenset(),
) -> Choice:
    """Choose among the configurations that meet the bar.

    The leader by S is the winner if a one-sided sign-flip test of paired q against every other
    has p <= alpha. Else it is tied with all that have p > alpha and at least 80 % of its S, and
    of these the largest margin is chosen, then S, then the lowest learning rate.

    Args:
        standings: At least one, each with q for every seed that is not dropped.
        alpha: Chance of naming a winner among equals, in (0, 1).
        dropped_seeds: Seeds that some configuration lacks, left out of every paired test.

    Returns:
        The choice and the reason; the order of `standings` does not matter.

    Raises:
        ValueError: There is nothing to choose from.

    Source:
        Exact paired permutation test over all 2**n signs; stability_search/README.md.
    """
    if not standings:
        raise ValueError("standings: at least one must meet the bar, but got none.")
    leader, *others = by_score(standings)
    seeds = sorted(set(leader.seed_indices) - dropped_seeds)
    if not others:
        return Choice(chosen=leader, reason=ChoiceReason.ONLY, num_seeds=len(seeds))
    own = _paired(leader, seeds)
    unseparated = [o for o in others if not _is_better(own, _paired(o, seeds), alpha)]
    is_close = abs(fmean(leader.q) - fmean(others[0].q)) <= CLOSE_Q
    if not unseparated:
        return Choice(
            chosen=leader, reason=ChoiceReason.WINNER, num_seeds=len(seeds), is_close=is_close
        )
    least = TIED_SHARE * leader.score.score
    tied = (leader, *(other for other in unseparated if other.score.score >= least))
    chosen = min(tied, key=lambda one: (-one.score.margin_octaves, tied.index(one)))
    return Choice(
        chosen=chosen, reason=ChoiceReason.TIED, tied=tied, num_seeds=len(seeds), is_close=is_close
    )


def _is_better(leader: Sequence[float], other: Sequence[float], alpha: float) -> bool:
    return bool(leader) and sign_flip_p(leader, other) <= alpha


def by_closeness(standings: Sequence[ConfigurationStanding]) -> list[ConfigurationStanding]:
    """Sort by what came closest to the bar: seeds with q >= 1/2, then margin, then S."""
    return sorted(
        standings,
        key=lambda one: (
            -sum(q >= S_V1.alive_q for q in one.q),
            -one.score.margin_octaves,
            -one.score.score,
            learning_rate_of(one.settings),
            one.config_id,
        ),
    )
