"""The paired test: exact, two-sided, on one yardstick, and silent where nothing can be tested."""

import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_search.comparison import pairs
from stability_search.comparison.pairs import PairedTest, pair_up, two_sided_p
from stability_search.comparison.sides import Side, read_side
from stability_search.records.trial import Outcome
from stability_search.step_files import write_steps
from tests.comparison.run_files import (
    chosen_rows,
    step_path,
    with_other_probes,
    with_row,
    write_run,
)
from tests.study_rows import StudyCase, hopeless_study, interrupted_study, stable_study

WORSE = {0: 1.5, 1: 1.3, 2: 1.2, 3: 1.6, 4: 1.4}


def shown_by(first: Side, second: Side) -> PairedTest:
    found = pair_up(first, second)
    assert found.test is not None, found.why_not
    return found.test


def brute_force_p(differences: Sequence[float]) -> float:
    """Count sign patterns whose sum lies at least as far from 0; the sums must be exact."""
    seen = abs(math.fsum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [
        math.fsum(s * d for s, d in zip(signs, differences, strict=True)) for signs in patterns
    ]
    return sum(abs(one) >= seen for one in sums) / len(patterns)


def test_a_hand_computed_p() -> None:
    # Differences 3, 2, -1 tenths: |sum| = 4. Of the 8 patterns +-3 +-2 +-1 the sums are
    # 6, 4, 2, 0, 0, -2, -4, -6: four of them lie at least 4 from 0.
    assert two_sided_p([0.8, 0.7, 0.4], [0.5, 0.5, 0.5]) == 4 / 8


def test_p_equals_counting_all_patterns_of_every_small_case() -> None:
    values = (0.0, 0.25, 0.5, 1.0)
    for n in range(4):
        for first in itertools.product(values, repeat=n):
            for second in itertools.product((0.25, 1.0), repeat=n):
                differences = [a - b for a, b in zip(first, second, strict=True)]
                assert two_sided_p(first, second) == brute_force_p(differences)


SIXTY_FOURTHS = st.integers(0, 64).map(lambda k: k / 64)  # sums of these are exact


@settings(max_examples=40)
@given(st.lists(st.tuples(SIXTY_FOURTHS, SIXTY_FOURTHS), max_size=6))
def test_p_is_a_chance_that_no_swap_changes_and_that_pairs_bound(
    drawn: list[tuple[float, float]],
) -> None:
    first, second = [a for a, _ in drawn], [b for _, b in drawn]
    p = two_sided_p(first, second)
    assert p == two_sided_p(second, first)
    assert min(1.0, 2.0 ** (1 - len(drawn))) <= p <= 1
    assert p == brute_force_p([a - b for a, b in drawn])


def test_pairs_that_all_agree_give_two_patterns() -> None:
    assert two_sided_p([0.9] * 5, [0.1, 0.2, 0.3, 0.4, 0.5]) == 1 / 16
    assert two_sided_p([0.1] * 6, [0.9] * 6) == 1 / 32
    assert two_sided_p([], []) == 1


def test_the_same_run_twice_does_not_differ(stable_side: Side) -> None:
    test = shown_by(stable_side, stable_side)
    assert [pair.seed for pair in test.pairs] == [77_000, 77_001, 77_002, 77_003, 77_004]
    assert all(pair.first == pair.second for pair in test.pairs)
    assert (test.mean_difference, test.p_value, test.least_p) == (0, 1, 1 / 16)


def test_a_worse_run_differs_and_swapped_only_the_sign_changes(
    stable_side: Side, tmp_path: Path
) -> None:
    worse = write_run(tmp_path / "worse", with_other_probes(stable_study(), WORSE))
    other = read_side(worse)
    there, back = shown_by(stable_side, other), shown_by(other, stable_side)
    assert there.mean_difference > 0.05
    assert back.mean_difference == -there.mean_difference
    assert back.p_value == there.p_value < 0.2
    assert [(pair.second, pair.first) for pair in back.pairs] == [
        (pair.first, pair.second) for pair in there.pairs
    ]
    by_hand = math.fsum(pair.first - pair.second for pair in there.pairs) / 5
    assert there.mean_difference == pytest.approx(by_hand)


def test_one_training_does_not_differ_from_itself_by_another_yardstick(
    stable_side: Side, lower_side: Side
) -> None:
    """Elsewhere in the second study a trial got further: q of the same training is lower there."""
    ours, theirs = stable_side, lower_side
    stored = [[row["q"] for row in side.confirmed.values()] for side in (ours, theirs)]
    assert all(a > b for a, b in zip(*stored, strict=True))
    assert two_sided_p(*stored) == 1 / 16  # what comparing them as they stand would claim

    for found in (pair_up(ours, theirs), pair_up(theirs, ours)):
        assert found.test is not None
        assert (found.test.mean_difference, found.test.p_value) == (0, 1)
        assert found.test.delta == theirs.measure.delta
        assert [pair.first for pair in found.test.pairs] == pytest.approx(stored[1])


def test_runs_of_one_yardstick_need_no_step_files(
    stable_side: Side, copied: Callable[[str], Path]
) -> None:
    bare = copied("bare")
    shutil.rmtree(bare / "steps")
    assert len(shown_by(stable_side, read_side(bare)).pairs) == 5


def test_trials_that_cannot_be_scored_again_are_left_out_and_named(
    copied: Callable[[str], Path], lower_side: Side
) -> None:
    rows, ours = chosen_rows(stable_study()), copied("ours")
    paths = [step_path(ours, row) for row in rows]
    paths[0].unlink()
    paths[1].write_bytes(b"PAR1")
    shutil.copy(paths[3], paths[2])
    short = replace(rows[4], summary=replace(rows[4].summary, num_planned_steps=5))
    write_steps(paths[4], b"", short)

    side = read_side(ours)
    found = pair_up(side, lower_side)

    assert found.test is not None
    assert [pair.seed for pair in found.test.pairs] == [77_003]
    assert found.test.least_p == 1
    words = ("no such step file", "damaged", "not the step file of", "cannot be scored")
    assert len(found.lost) == len(words)
    for text, word, path in zip(found.lost, words, (*paths[:3], paths[4]), strict=True):
        assert word in text
        assert str(path) in text

    paths[3].unlink()
    found = pair_up(lower_side, read_side(ours))
    assert found.test is None
    assert found.why_not == "No seed in common could be scored again."
    assert len(found.lost) == 5


def test_a_stopped_trial_counts_as_0_a_lost_one_is_no_pair_and_a_repeated_one_is(
    stable_side: Side, tmp_path: Path
) -> None:
    case = stable_study()
    ends = (Outcome.DIVERGED, Outcome.INFRASTRUCTURE, Outcome.INFRASTRUCTURE)
    for row, outcome in zip(chosen_rows(case), ends, strict=False):
        summary = replace(row.summary, outcome=outcome)
        case = with_row(case, row, replace(row, summary=summary))
    again = replace(chosen_rows(stable_study())[2], attempt=2)
    other = write_run(tmp_path / "other", replace(case, rows=(again, *case.rows)))
    found = shown_by(stable_side, read_side(other)).pairs
    assert [pair.seed for pair in found] == [77_000, 77_002, 77_003, 77_004]
    assert found[0].second == 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (interrupted_study, "B has no configuration to compare."),
        (lambda: without_confirm(stable_study()), "B has no confirm trial."),
    ],
    ids=["interrupted", "without confirm trials"],
)
def test_without_confirm_trials_there_is_no_test(
    stable_side: Side, tmp_path: Path, make: Callable[[], StudyCase], why: str
) -> None:
    other = read_side(write_run(tmp_path / "other", make()))
    assert pair_up(stable_side, other).why_not == why


def without_confirm(case: StudyCase) -> StudyCase:
    """Let the verdict name a configuration that only the search has seen."""
    row = next(row for row in case.rows if row.stage == "search")
    kept = tuple(row for row in case.rows if row.stage != "confirm")
    verdict = replace(case.verdict, choice=row.config_id, tied=(), confirmed=(), fastest=None)
    return replace(case, rows=kept, verdict=verdict)


def test_the_closest_of_a_study_without_a_choice_is_compared(
    stable_side: Side, tmp_path: Path
) -> None:
    other = write_run(tmp_path / "none", hopeless_study())
    test = shown_by(stable_side, read_side(other))
    assert [pair.second for pair in test.pairs] == [0] * 5
    assert test.p_value == test.least_p == 1 / 16


def test_other_seeds_are_no_pairs(stable_side: Side) -> None:
    trials = tuple({**row, "seed": row["seed"] + 1000} for row in stable_side.trials)
    found = pair_up(stable_side, replace(stable_side, trials=trials))
    assert found.why_not.startswith("The two have no seed in common: study seeds 0 and 0.")


@pytest.mark.parametrize(
    "changed", [{"delta": None}, {"e0": None}, {"e0": None, "delta": None}], ids=str
)
def test_without_a_signal_there_is_no_test(
    stable_side: Side, changed: dict[str, float | None]
) -> None:
    other = replace(stable_side, measure=replace(stable_side.measure, **changed))
    for first, second in ((stable_side, other), (other, stable_side), (other, other)):
        assert "no signal" in pair_up(first, second).why_not


def test_rows_that_no_version_of_ours_wrote_are_named(
    stable_side: Side, lower_side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(path: Path) -> object:
        raise KeyError(path.name)

    monkeypatch.setattr(pairs, "read_row", spoiled)
    assert len(pair_up(stable_side, lower_side).lost) == 5
