"""Who wins, who is tied, and what came closest."""
# ruff: noqa: S311 - dice for tests, not for secrets

import random
from collections.abc import Sequence

import pytest

from stability_search.records.verdict import ChoiceReason
from stability_search.scoring.configuration import stability_score
from stability_search.search.choice import by_closeness, choose
from stability_search.standing import ConfigurationStanding


def standing(
    name: str,
    q: Sequence[float],
    *,
    margin: int = 3,
    rate: float = 0.1,
    seeds: Sequence[int] = (),
) -> ConfigurationStanding:
    rungs = [(1.0, 1.0)] * margin + [(0.0, 0.0)] * (3 - margin)
    return ConfigurationStanding(
        config_id=name,
        settings={"learning_rate": rate},
        score=stability_score(q, rungs, 3),
        q=tuple(q),
        seed_indices=tuple(seeds or range(len(q))),
        calm=1.0,
        smooth=1.0,
        kept=1.0,
        progress=1.0,
        rungs=tuple(rungs),
        meets_bar=True,
        missed=(),
        num_completed=len(q),
        num_bad_steps=0,
        num_judged_steps=400,
        bad_rate_bound=0.01,
        num_planned_steps=400,
        probe_last=1.0,
    )


def test_five_seeds_that_agree_win_at_a_single_look_only() -> None:
    best, other = standing("best", [0.9] * 5), standing("other", [0.8] * 5)
    one_look = choose([other, best], alpha=0.05)
    assert (one_look.chosen, one_look.reason) == (best, ChoiceReason.WINNER)
    assert one_look.tied == ()
    two_looks = choose([other, best], alpha=0.025)  # 1/32 = .031
    assert (two_looks.chosen, two_looks.reason) == (best, ChoiceReason.TIED)
    assert two_looks.tied == (best, other)


def test_three_seeds_never_win_nor_do_five_of_which_one_disagrees() -> None:
    assert (
        choose([standing("a", [1.0] * 3), standing("b", [0.5] * 3)], alpha=0.05).reason
        is ChoiceReason.TIED
    )
    assert (
        choose([standing("a", [1, 1, 1, 1, 0.7]), standing("b", [0.8] * 5)], alpha=0.05).reason
        is ChoiceReason.TIED
    )


def test_the_leader_must_beat_every_other() -> None:
    leader = standing("leader", [0.9] * 5)
    beaten, close = standing("beaten", [0.6] * 5), standing("close", [0.95, *[0.85] * 4])
    choice = choose([beaten, close, leader], alpha=0.05)
    assert choice.reason is ChoiceReason.TIED
    assert {one.config_id for one in choice.tied} == {"leader", "close"}


def test_far_below_the_leader_is_not_tied_even_if_no_test_can_tell() -> None:
    leader = standing("leader", [1.0] * 3)
    weak = standing("weak", [0.55] * 3)
    choice = choose([weak, leader], alpha=0.05)
    assert weak.score.score < 0.8 * leader.score.score
    assert (choice.chosen, choice.reason, choice.tied) == (leader, ChoiceReason.TIED, (leader,))


def test_among_the_tied_the_margin_decides_then_the_score_then_the_lowest_rate() -> None:
    leader = standing("leader", [1.0] * 3, margin=2)
    wide = standing("wide", [0.9] * 3, margin=3)
    assert leader.score.score > wide.score.score
    assert choose([leader, wide], alpha=0.05).chosen is wide
    better, worse = standing("better", [0.95] * 3), standing("worse", [0.94] * 3)
    assert choose([worse, better], alpha=0.05).chosen is better
    low, high = standing("b", [0.9] * 3, rate=0.1), standing("a", [0.9] * 3, rate=0.2)
    assert choose([high, low], alpha=0.05).chosen is low


def test_the_only_one_is_called_that() -> None:
    only = standing("only", [0.9] * 5)
    assert choose([only], alpha=0.05).reason is ChoiceReason.ONLY


def test_a_dropped_seed_is_dropped_for_all() -> None:
    best, other = standing("best", [0.9] * 5), standing("other", [0.8] * 5)
    choice = choose([best, other], alpha=0.05, dropped_seeds=frozenset({3}))
    assert (choice.num_seeds, choice.reason) == (4, ChoiceReason.TIED)  # 1/16
    six = [standing("best", [0.9] * 6), standing("other", [0.8] * 6)]
    choice = choose(six, alpha=0.05, dropped_seeds=frozenset({3}))
    assert (choice.num_seeds, choice.reason) == (5, ChoiceReason.WINNER)


def test_seeds_are_paired_by_their_index() -> None:
    best = standing("best", [0.9, 0.8, 0.7, 0.9, 0.8], seeds=(0, 1, 2, 3, 4))
    other = standing("other", [0.85, 0.75, 0.65, 0.85, 0.75], seeds=(0, 1, 2, 3, 4))
    assert choose([best, other], alpha=0.05).reason is ChoiceReason.WINNER


@pytest.mark.parametrize(("gap", "is_close"), [(0.01, True), (0.03, False)])
def test_close_is_two_hundredths_in_mean_q_of_the_two_best_scores(
    gap: float, *, is_close: bool
) -> None:
    third = standing("third", [0.5] * 5)
    pair = [standing("a", [0.9] * 5), standing("b", [0.9 - gap] * 5)]
    assert choose([third, *pair], alpha=0.025).is_close is is_close


def test_closest_counts_seeds_then_margin_then_score() -> None:
    most = standing("most", [0.5, 0.5, 0.5, 0.1], margin=0)
    wide = standing("wide", [1.0, 1.0, 0.4, 0.4], margin=2)
    narrow = standing("narrow", [1.0, 1.0, 0.49, 0.49], margin=1)
    weaker = standing("weaker", [0.6, 0.6, 0.0, 0.0], margin=1)
    order = [most, wide, narrow, weaker]
    for seed in range(10):
        shuffled = order.copy()
        random.Random(seed).shuffle(shuffled)
        assert by_closeness(shuffled) == order


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one must meet the bar"):
        choose([], alpha=0.05)
