"""What is told while a study runs is what its report says at that moment."""

import dataclasses
import random
from pathlib import Path
from statistics import fmean

import pytest

from stability_search import space as spaces
from stability_search.records.trial import Stage, TrialRow, TrialSummary
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import status
from stability_search.search.plan import StudyPlan
from stability_search.search.reported import ReportedYardsticks
from stability_search.search.request import TrialRequest
from stability_search.space import Space
from stability_search.standing import score_trial
from stability_search.table import build_tables, study_yardsticks
from stability_search.yardstick import GrowingYardstick
from tests.search.inline_study import pretend, run_all, write_space


def forgetful(request: TrialRequest) -> TrialSummary:
    """Lose in the pilot what was learned, once the steps of a search trial are over."""
    summary = pretend(request)
    if request.stage is not Stage.PILOT:
        return summary
    read = zip(summary.probe_steps, summary.probe_losses, strict=False)
    losses = tuple(5.0 if step > 20 else loss for step, loss in read)
    return dataclasses.replace(
        summary, probe_losses=losses, probe_batch_losses=tuple((loss,) * 4 for loss in losses)
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Space, list[TrialRow]]:
    """Return a space and the rows of its study, of which the pilot learned nothing to last."""
    small = ("search.trials=3",)
    space = spaces.load(write_space(tmp_path_factory.mktemp("news"), sampler="random"), small)
    return space, run_all(StudyPlan(space, device="cpu"), forgetful)


@pytest.mark.parametrize("order", ["as they ended", "shuffled"])
def test_after_every_trial_they_are_those_of_a_report(
    study: tuple[Space, list[TrialRow]], order: str
) -> None:
    space, rows = study[0], [*study[1]]
    if order == "shuffled":
        random.Random(0).shuffle(rows)  # noqa: S311 - an order, no secret
    ours = ReportedYardsticks(space.study)
    for count, row in enumerate(rows, start=1):
        ours.add(row)
        report = study_yardsticks(rows[:count], space.study)
        assert ours.of_stage(Stage.PILOT) == ours.of_stage(Stage.SEARCH) == report[20]
        assert ours.of_stage(Stage.CONFIRM) == report[30]


def test_the_first_trials_that_learn_at_all_are_not_told_as_q_0(tmp_path: Path) -> None:
    space = spaces.load(write_space(tmp_path, sampler="random"), ("search.trials=3",))
    plan = StudyPlan(space, device="cpu")
    by_pilot, news = GrowingYardstick(30), []
    while (request := plan.next_trial()) is not None:
        row = plan.finish(request, forgetful(request), started_at="", node="")
        score = score_trial(row, plan.measure_of(row))
        by_pilot.add(row) if row.stage is Stage.PILOT else None
        if row.stage is Stage.CONFIRM and score is not None:
            twin = score_trial(row, by_pilot.now)
            assert twin is not None
            news.append((score.q, twin.q))

    assert max(q for q, _ in news) > 0.9
    assert {twin for _, twin in news} == {0.0}, "by the pilot alone nothing has learned"


def test_the_status_of_a_run_says_what_its_tables_say(
    study: tuple[Space, list[TrialRow]],
) -> None:
    space, rows = study
    for count in (9, 10, 11, 13, len(rows)):
        yardsticks = study_yardsticks(rows[:count], space.study)
        trials = build_tables(
            rows[:count],
            space_settings=space.varying,
            study=space.study,
            yardsticks=yardsticks,
            verdict=Verdict(kind=VerdictKind.INCOMPLETE, exit_code=6),
        ).trials
        best = status._best(space, rows[:count], None)  # noqa: SLF001
        assert best is not None
        of_stage = trials[trials["stage"] == best.stage.value]
        table = {
            name: fmean(of_stage["q"][of_stage["config_id"] == name].dropna())
            for name in of_stage["config_id"].unique()
        }
        assert best.q == pytest.approx(table[best.config_id], rel=1e-12)
        assert best.q == pytest.approx(max(table.values()), rel=1e-12)
    assert best.stage is Stage.CONFIRM
    assert best.q > 0.9


def test_without_signal_everything_is_told_as_q_0(study: tuple[Space, list[TrialRow]]) -> None:
    space, rows = study[0], [_in_noise(row) for row in study[1]]
    report = study_yardsticks(rows, space.study)
    ours = ReportedYardsticks(space.study, rows)
    assert ours.of_stage(Stage.SEARCH) == report[20]
    assert not report[20].has_signal
    assert max(row.told_value or 0 for row in rows) > 0.9, "the sampler heard more"
    for count in (10, len(rows)):  # the search's end, and the study's
        best = status._best(space, rows[:count], None)  # noqa: SLF001
        assert best is not None
        assert best.q == 0


def _in_noise(row: TrialRow) -> TrialRow:
    """Spread the probe's batches so far that no difference between two trials counts."""
    summary = row.summary
    noise = tuple(
        () if loss is None else tuple(loss * (1 + part) for part in (-300, -100, 100, 300))
        for loss in summary.probe_losses
    )
    return dataclasses.replace(row, summary=dataclasses.replace(summary, probe_batch_losses=noise))
