"""Lost workers, and trials that fail alike: tried again, given up, or the user's code."""

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from stability_search import space as spaces
from stability_search.errors import InfrastructureError, UserCodeError
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.records.verdict import VerdictKind
from stability_search.search.request import TrialRequest
from stability_search.search.sampler import Sampler
from tests.search.inline_study import lost, pretend, run_all, train, write_space
from tests.search.planned import alike, load, lost_like, plan_of, settings_of


def test_a_lost_worker_is_tried_again_twice_and_never_held_against_a_configuration(
    tmp_path: Path,
) -> None:
    space = load(tmp_path)
    seen: dict[str, int] = {}

    def lose_twice(request: TrialRequest) -> TrialSummary:
        seen[request.trial_id] = seen.get(request.trial_id, 0) + 1
        assert request.attempt == seen[request.trial_id]
        is_victim = request.trial_id in {"search-0002", "pilot-03"}
        return lost(request) if is_victim and request.attempt < 3 else pretend(request)

    plan = plan_of(space)
    rows = run_all(plan, lose_twice)
    attempts = [
        (row.attempt, row.summary.outcome) for row in rows if row.trial_id == "search-0002"
    ]
    assert attempts == [
        (1, Outcome.INFRASTRUCTURE),
        (2, Outcome.INFRASTRUCTURE),
        (3, Outcome.COMPLETED),
    ]
    undisturbed = run_all(plan_of(space))
    assert settings_of([r for r in rows if r.summary.outcome.is_result], Stage.SEARCH) == (
        settings_of(undisturbed, Stage.SEARCH)
    )
    assert plan.verdict is not None
    assert plan.verdict.kind is VerdictKind.STABLE


def test_a_trial_lost_three_times_is_given_up_and_told_as_nothing(tmp_path: Path) -> None:
    plan = plan_of(load(tmp_path))
    rows = run_all(plan, lambda r: lost(r) if r.trial_id == "search-0001" else pretend(r))
    last = [row for row in rows if row.trial_id == "search-0001"][-1]
    assert (last.attempt, last.told_value) == (3, None)


def test_many_lost_workers_do_not_make_the_sampler_hear_everything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(load(tmp_path, "search.trials=34"))
    victims = {"search-0010", "search-0020", "search-0030"}
    rebuilt: list[int] = []
    rebuild = Sampler.rebuild

    def count(sampler: Sampler, history: Iterable[Any]) -> None:
        rebuilt.append(len(plan.rows))
        rebuild(sampler, history)

    monkeypatch.setattr(Sampler, "rebuild", count)
    rows = run_all(
        plan, lambda r: lost(r) if r.trial_id in victims and r.attempt < 3 else alike(r)
    )
    e_stars = [row.told_e_star for row in rows if row.told_e_star is not None]
    num_moves = sum(one != two for one, two in itertools.pairwise(e_stars))
    assert [row.trial_id for row in rows if row.attempt == 3] == sorted(victims)
    assert len(rebuilt) <= num_moves + 1  # the first move is that from the pilot's


def test_a_study_resumed_while_a_lost_trial_waits_goes_on_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    """The lost proposal counts as in flight while it is tried again, as it did before."""
    space = load(tmp_path, "search.trials=30")

    def lose_once(request: TrialRequest) -> TrialSummary:
        is_victim = request.trial_id == "search-0020" and request.attempt == 1
        return lost(request) if is_victim else pretend(request)

    whole = run_all(plan_of(space), lose_once)
    stop = next(k for k, row in enumerate(whole) if row.summary.outcome is Outcome.INFRASTRUCTURE)
    resumed = run_all(plan_of(space, tuple(whole[: stop + 1])), lose_once)
    assert [row.config_id for row in resumed] == [row.config_id for row in whole]
    assert [row.told_value for row in resumed] == [row.told_value for row in whole]


def test_a_lost_trial_is_tried_again_after_a_resume(tmp_path: Path) -> None:
    space = load(tmp_path)
    whole = run_all(plan_of(space))
    victim = dataclasses.replace(
        whole[8],
        summary=lost_like(whole[8]),
        told_value=None,
        told_constraint=None,
        told_e_star=None,
    )
    plan = plan_of(space, (*whole[:8], victim))
    request = plan.next_trial()
    assert request is not None
    assert (request.trial_id, request.attempt) == (victim.trial_id, 2)
    row = plan.finish(request, pretend(request), started_at="", node="")
    assert row.told_value == whole[8].told_value


def test_five_early_trials_that_fail_alike_are_the_user_s_code(tmp_path: Path) -> None:
    path = write_space(tmp_path)
    path.write_text(path.read_text() + "task_args: {behaviour: raise}\n")
    words = (
        r"(?s)first 5 trials all failed with KeyError at .*tiny_task.py:\d+.*a bug of the user's"
    )
    with pytest.raises(UserCodeError, match=words):
        run_all(plan_of(spaces.load(path)), train)


def test_one_early_trial_that_fails_is_not(tmp_path: Path) -> None:
    def fail_once(request: TrialRequest) -> TrialSummary:
        if request.trial_id != "pilot-00":
            return pretend(request)
        return dataclasses.replace(
            lost(request), outcome=Outcome.USER_ERROR, error_type="KeyError", error_place="x:1"
        )

    plan = plan_of(load(tmp_path))
    run_all(plan, fail_once)
    assert plan.verdict is not None
    assert plan.verdict.kind is VerdictKind.STABLE


def test_too_many_lost_workers_end_the_study(tmp_path: Path) -> None:
    with pytest.raises(InfrastructureError, match="6 of 6 attempts lost their worker"):
        run_all(plan_of(load(tmp_path)), lost)


def test_lost_workers_of_an_earlier_run_do_not_end_a_resumed_one(tmp_path: Path) -> None:
    space = load(tmp_path)
    rows: list[TrialRow] = []
    plan = plan_of(space)
    for _ in range(6):
        request = plan.next_trial()
        assert request is not None
        rows.append(plan.finish(request, lost(request), started_at="", node=""))
    resumed = plan_of(space, tuple(rows))
    run_all(resumed)
    assert resumed.verdict is not None


def test_a_resumed_study_whose_task_still_fails_is_the_user_s_code_again(tmp_path: Path) -> None:
    path = write_space(tmp_path)
    path.write_text(path.read_text() + "task_args: {behaviour: raise}\n")
    space = spaces.load(path)
    plan = plan_of(space)
    with pytest.raises(UserCodeError, match="first 5 trials"):
        run_all(plan, train)
    with pytest.raises(UserCodeError, match="first 6 trials"):
        run_all(plan_of(space, tuple(plan.rows)), train)
