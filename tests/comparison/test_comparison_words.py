"""What a comparison says: never more than its seeds allow, in three forms that agree."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stability_search.comparison import (
    Comparison,
    as_document,
    as_lines,
    as_rows,
    compare,
)
from stability_search.comparison.differences import Difference
from stability_search.comparison.pairs import Pair, PairedTest, Pairing, two_sided_p
from tests.comparison.run_files import edit_json, edit_space, write_run
from tests.study_rows import empty_study, hopeless_study, interrupted_study

Copied = Callable[[str], Path]


@pytest.fixture(scope="session")
def same(stable_run: Path) -> Comparison:
    return compare(stable_run, stable_run)


def with_test(same: Comparison, first: list[float], second: list[float]) -> list[str]:
    """Return the lines about a test of these q."""
    p = two_sided_p(first, second)
    test = PairedTest(
        pairs=tuple(
            Pair(seed=n, first=a, second=b)
            for n, (a, b) in enumerate(zip(first, second, strict=True))
        ),
        mean_difference=sum(a - b for a, b in zip(first, second, strict=True)) / len(first),
        p_value=p,
        least_p=min(1.0, 2.0 ** (1 - len(first))),
        e0=1.84,
        delta=1.2,
    )
    lines = as_lines(replace(same, pairing=Pairing(test=test)))
    return lines[next(n for n, line in enumerate(lines) if line.startswith("mean of")) :]


def test_the_same_run_twice_says_so(same: Comparison) -> None:
    lines = as_lines(same)
    assert (
        "comparable: the same task (teacher), horizon (400 steps), device (cpu), "
        "score version (S-v1)" in lines
    )
    assert "settings of the two configurations: none differs" in lines
    assert "what was asked of the two studies: none differs" in lines
    test = "exact two-sided sign-flip test p = 1 (32 of 32 patterns of signs)"
    assert lines[-2:] == [
        f"mean of A minus B: +0.000; {test}",
        "q is the same on each of 5 pairs.",
    ]


def test_a_score_stands_with_all_that_it_never_stands_without(same: Comparison) -> None:
    text = "\n".join(as_lines(same))
    for words in (
        "score                   73.9 of at most 77.3",
        "A 1.00, B 1.00, C 1.00, P 1.00",
        "Q                       0.773",
        "at least 3 doublings",
        "5 of 5 seeds stable",
        "0 of 2,000, at most 0.15 %",
        "bounded at 95 % confidence",
        "400 steps",
        "  killed for bad steps  6 ",
        "steps                   22,635",
    ):
        assert words in text


def test_five_pairs_conclude_nothing_however_large_the_difference(same: Comparison) -> None:
    lines = with_test(same, [1.0] * 5, [0.0] * 5)
    assert lines[0] == (
        "mean of A minus B: +1.000; exact two-sided sign-flip test p = 0.0625 "
        "(2 of 32 patterns of signs)"
    )
    assert lines[1] == (
        "5 pairs cannot give a p below 0.0625, so they cannot show a difference at the 5 % level, "
        "however large; 6 could. Nothing is concluded."
    )
    assert "flatters" in lines[2]


def test_six_pairs_that_agree_show_which_is_higher_and_no_more(same: Comparison) -> None:
    for first, second, higher in (([0.9] * 6, [0.5] * 6, "A"), ([0.5] * 6, [0.9] * 6, "B")):
        line = with_test(same, first, second)[1]
        assert line.startswith(f"{higher} has the higher q on 6 pairs: were the two alike")
        assert "in 3.12% of cases" in line
        assert "this task and horizon" in line


def test_pairs_that_disagree_show_nothing_which_is_not_nothing(same: Comparison) -> None:
    line = with_test(same, [0.9, 0.9, 0.9, 0.9, 0.9, 0.1], [0.5] * 6)[1]
    assert line.endswith(
        "do not show a difference at the 5 % level; that is not to say there is none."
    )


def test_one_pair_is_one_pair(same: Comparison) -> None:
    lines = with_test(same, [0.9], [0.5])
    assert "p = 1 (2 of 2 patterns" in lines[0]
    assert lines[1].startswith("1 pair cannot give a p below 1,")


def test_of_many_pairs_patterns_are_not_counted_out(same: Comparison) -> None:
    lines = with_test(same, [0.9] * 30, [0.5] * 30)
    assert lines[0].endswith(f"p = {2.0**-29:.4g}")


def test_runs_that_cannot_be_compared_are_shown_and_not_tested(
    stable_run: Path, copied: Copied
) -> None:
    other = copied("other")
    edit_space(other, "task: teacher", "task: detector")
    edit_json(other / "report.json", {"best.score_version": "S-v2"})
    found = compare(stable_run, other)
    lines = as_lines(found)
    at = lines.index("not comparable: q does not mean the same in both, so nothing is tested")
    assert lines[at + 1 : at + 3] == [
        "  task: teacher in A, detector in B",
        "  score version: S-v1 in A, S-v2 in B",
    ]
    assert any(line.startswith("score ") for line in lines)
    assert not any("sign-flip" in line for line in lines)
    document = as_document(found)
    assert document["is_comparable"] is False
    assert document["test"] is None
    assert document["why_no_test"] == "The runs cannot be compared."
    assert len(document["reasons"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [hopeless_study, interrupted_study, empty_study])
def test_every_end_of_a_study_is_shown_in_every_form(
    stable_run: Path, tmp_path: Path, make: Callable[[], object]
) -> None:
    other = write_run(tmp_path / "other", make())  # type: ignore[arg-type]
    straight = compare(stable_run, other)
    turned = replace(straight, paths=straight.paths[::-1], sides=straight.sides[::-1])
    text = "\n".join(as_lines(straight))
    for found in (straight, turned):
        assert len(as_lines(found)) > 20
        json.dumps(as_document(found), allow_nan=False)
        rows = as_rows(found)
        assert {tuple(row) for row in rows} == {("part", "name", "first", "second")}
        json.dumps(rows, allow_nan=False)
    if make is hopeless_study:
        assert "no doubling" in text
    else:
        assert "settings of the two configurations: there are not two" in text
        assert "no test: B has no configuration to compare." in text


def test_the_forms_agree(same: Comparison) -> None:
    document, rows = as_document(same), as_rows(same)
    cells = {(row["part"], row["name"]): (row["first"], row["second"]) for row in rows}
    first, test = document["first"], document["test"]
    assert isinstance(first, dict)
    assert isinstance(test, dict)
    assert cells["run", "score"] == (first["score"], first["score"])
    assert cells["run", "num_trials"] == (90, 90)
    assert cells["outcome", "pruned"] == (6, 6)
    assert cells["test", "p_value"] == (test["p_value"], None)
    assert [name for part, name in cells if part == "q by seed"] == [
        str(n) for n in range(77_000, 77_005)
    ]
    assert test["num_pairs"] == 5
    assert document["schema"] == "stability-search/comparison/1"


def test_values_that_look_the_same_when_cut_are_called_different(same: Comparison) -> None:
    long = [{"learning_rate": 0.1, "precision": "fp32", "clip_norm": n} for n in (1, 2)]
    one = Difference(name="start_with", first=[long[0]], second=[long[1]])
    line = next(line for line in as_lines(replace(same, space=(one,))) if "start_with" in line)
    assert line.endswith("...  another; --format json shows both")
    named = Difference(name="clip_norm", first=None, second=1.0, is_in_first=False)
    off = Difference(name="scale", first=None, second=2, is_in_second=False)
    lines = as_lines(replace(same, space=(named, off)))
    assert "  clip_norm  not named  1.0" in lines
    assert "  scale      null       2 (default)" in lines


def test_trials_that_were_left_out_are_named(same: Comparison) -> None:
    pairing = Pairing(why_not="No seed.", lost=("steps/a.parquet: no such step file.",))
    assert as_lines(replace(same, pairing=pairing))[-2:] == [
        "no test: No seed.",
        "left out: steps/a.parquet: no such step file.",
    ]
