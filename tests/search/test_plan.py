"""Which trial comes next, and how a study ends; run without Ray."""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest

from stability_search import space as spaces
from stability_search.errors import UsageError
from stability_search.records.trial import Outcome, Stage, TrialRow, TrialSummary
from stability_search.records.verdict import VerdictKind
from stability_search.search.plan import planned_work
from stability_search.search.request import Order, TrialRequest
from tests.search.inline_study import lost, pretend, run_all, train, write_space
from tests.search.planned import alike, load, plan_of, unstable


def test_a_study_goes_through_its_stages_in_order_and_ends_with_a_choice(tmp_path: Path) -> None:
    space = load(tmp_path)
    plan = plan_of(space)
    rows = run_all(plan, train)
    stages = [row.stage for row in rows]
    assert stages == sorted(stages, key=list(Stage).index)
    assert stages.count(Stage.PILOT) == 7
    assert stages.count(Stage.SEARCH) == 6
    assert plan.verdict is not None
    assert (plan.verdict.kind, plan.verdict.exit_code) == (VerdictKind.STABLE, 0)
    assert plan.verdict.choice in {row.config_id for row in rows if row.stage is Stage.CONFIRM}
    assert dict(rows[7].settings)["learning_rate"] == 0.01  # start_with comes first


def test_the_pilot_reads_the_tenths_of_both_horizons_and_no_constant_is_known(
    tmp_path: Path,
) -> None:
    request = plan_of(load(tmp_path)).next_trial()
    assert request is not None
    assert request.config.num_planned_steps == 30
    assert set(request.constants.probe_steps) == {2 * k for k in range(11)} | {
        3 * k for k in range(11)
    }
    assert (request.constants.e0, request.constants.delta) == (None, None)
    assert request.constants.measures_blind_run


def test_search_and_confirm_are_given_the_constants_of_their_own_horizon(tmp_path: Path) -> None:
    rows = run_all(plan_of(load(tmp_path)))
    for row in rows:
        if row.stage is not Stage.PILOT:
            assert row.delta is not None
            assert row.e0 is not None
            assert row.delta > 0
    confirm = [row for row in rows if row.stage is Stage.CONFIRM]
    assert len({(row.e0, row.delta) for row in confirm}) == 1  # as it stood when confirm began
    assert {row.seed for row in confirm}.isdisjoint({rows[0].seed})


def test_what_the_sampler_is_told_is_finite_and_only_of_search_trials(tmp_path: Path) -> None:
    for row in run_all(plan_of(load(tmp_path))):
        assert (row.told_value is None) == (row.stage is not Stage.SEARCH)
        if row.told_value is not None and row.told_constraint is not None:
            assert math.isfinite(row.told_value)
            assert math.isfinite(row.told_constraint)


@pytest.mark.parametrize("finished", [0, 3, 7, 8, 11, 13, 15])
def test_a_study_resumed_after_any_trial_asks_for_the_same_trials(
    tmp_path: Path, finished: int
) -> None:
    space = load(tmp_path)
    whole = run_all(plan_of(space))
    resumed = run_all(plan_of(space, tuple(whole[:finished])))
    assert [row.trial_id for row in resumed] == [row.trial_id for row in whole]
    assert [row.config_id for row in resumed] == [row.config_id for row in whole]
    assert [row.told_value for row in resumed] == [row.told_value for row in whole]


@pytest.mark.parametrize("order_seed", [1, 2])
def test_without_learning_the_order_of_finishing_changes_no_configuration(
    tmp_path: Path, order_seed: int
) -> None:
    space = load(tmp_path, sampler="random")
    alone = run_all(plan_of(space))
    together = run_all(plan_of(space), slots=3, order_seed=order_seed)

    def by_index(rows: list[TrialRow]) -> list[str]:
        search = [row for row in rows if row.stage is Stage.SEARCH]
        return [row.config_id for row in sorted(search, key=lambda row: row.index)]

    assert by_index(alone) == by_index(together)


def operations(action: Callable[[], object]) -> int:
    """Count the bytecode operations that an action takes in this package."""
    count = 0

    def trace(frame: FrameType, event: str, _arg: object) -> Any:  # noqa: ANN401 - a tracer
        nonlocal count
        if "stability_search" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_a_trial_costs_the_plan_the_same_after_few_and_after_many(
    tmp_path: Path, sampler: str
) -> None:
    plan = plan_of(load(tmp_path, "search.trials=1000", sampler=sampler))

    def one_trial() -> None:
        request = plan.next_trial()
        assert request is not None
        row = plan.finish(request, alike(request), started_at="", node="")
        plan.measure_of(row)

    costs = []
    for num_trials in (40, 240):
        while len(plan.rows) < num_trials:
            one_trial()
        costs.append(min(operations(one_trial) for _ in range(5)))
    print(f"operations a trial: {costs[0]} after 40, {costs[1]} after 240")
    assert costs[1] < 1.05 * costs[0] + 100


def test_the_trials_of_a_study_depend_on_the_set_of_rows_and_not_on_their_order(
    tmp_path: Path,
) -> None:
    space = load(tmp_path, "search.trials=30")
    rows = run_all(plan_of(space), lambda r: lost(r) if r.trial_id == "search-0003" else alike(r))
    rows = [row for row in rows if row.stage is not Stage.CONFIRM][:30]
    shuffled = [*rows]
    Random(1).shuffle(shuffled)  # noqa: S311 - an order, no secret
    ours, other = plan_of(space, tuple(rows)), plan_of(space, tuple(shuffled))
    for _ in range(4):
        assert ours.next_trial() == other.next_trial()
    assert ours.measure_of(rows[-1]) == other.measure_of(rows[-1])


def test_the_first_trial_tries_every_setting_that_a_model_may_be_unable_to_honour(
    tmp_path: Path,
) -> None:
    path = write_space(
        tmp_path,
        text="task: {task}:Tiny\ntrial: {{steps: 20}}\nspace:\n"
        "  learning_rate: {{loguniform: {{low: 1e-4, high: 1.0}}}}\n"
        "  precision: {{choice: [fp32, bf16, fp16]}}\n"
        "  attention_clamp: {{choice: [null, 5.0, 10.0]}}\n"
        "  width: {{choice: [8, 16]}}\n"
        "confirm: {{steps: 20}}\n",
    )
    plan = plan_of(spaces.load(path))
    first, second = plan.next_trial(), plan.next_trial()
    assert first is not None
    assert second is not None
    tried = {
        (c.engine.precision, c.engine.attention_clamp, c.task_args["width"])
        for c in first.preflight
    }
    assert tried == {
        (precision, clamp, width)
        for precision, clamp in (("fp32", None), ("bf16", None), ("fp32", 10.0))
        for width in (8, 16)
    }
    assert second.preflight == ()


def test_a_setting_the_model_cannot_honour_ends_the_study_before_it_begins(
    tmp_path: Path,
) -> None:
    path = write_space(tmp_path)
    path.write_text(
        path.read_text()
        .replace(
            "  clip_norm: {choice: [null, 1.0]}",
            "  clip_norm: {choice: [null, 1.0]}\n  attention_clamp: {choice: [null, 10.0]}",
        )
        .replace("clip_norm: 1.0}", "clip_norm: 1.0, attention_clamp: null}")
    )
    with pytest.raises(UsageError, match=r"attention_clamp: .* no nn.MultiheadAttention.*`when`"):
        run_all(plan_of(spaces.load(path)), train)


def test_a_space_where_nothing_is_stable_is_a_finished_study(tmp_path: Path) -> None:
    plan = plan_of(load(tmp_path))
    rows = run_all(plan, unstable)
    assert plan.verdict is not None
    assert (plan.verdict.kind, plan.verdict.exit_code) == (VerdictKind.NONE, 3)
    assert all(row.told_constraint > 0 for row in rows if row.told_constraint is not None)


def test_a_file_without_a_space_is_confirmed_without_a_search(tmp_path: Path) -> None:
    path = write_space(
        tmp_path,
        text="task: {task}:Tiny\ntrial: {{steps: 20}}\n"
        "fixed: {{learning_rate: 0.01, batch_size: 8}}\n"
        "confirm: {{seeds: 2, steps: 20, octaves: 1, min_margin: 0}}\n",
    )
    plan = plan_of(spaces.load(path))
    rows = run_all(plan)
    assert {row.stage for row in rows} == {Stage.PILOT, Stage.CONFIRM}
    rates = [row.settings["learning_rate"] for row in rows if row.stage is Stage.PILOT]
    assert rates[0] == 0.0025
    assert rates[-1] == 0.04
    assert plan.verdict is not None
    assert plan.verdict.kind is VerdictKind.STABLE


def test_the_search_starts_no_trial_once_half_of_the_steps_are_spent(tmp_path: Path) -> None:
    plan = plan_of(load(tmp_path, "search.step_budget=900", "search.trials=40"))
    rows = run_all(plan)
    num_search = sum(row.stage is Stage.SEARCH for row in rows)
    steps = [row.summary.num_steps for row in rows]
    assert sum(steps[:7]) == 6 * 30 + 3  # the highest rate of the pilot was killed at step 3
    assert sum(steps[: 7 + num_search - 1]) < 450 <= sum(steps[: 7 + num_search])
    assert sum(steps) <= 900
    assert plan.verdict is not None
    assert plan.verdict.kind is VerdictKind.STABLE


@pytest.mark.parametrize(("budget", "num_search"), [(300, 0), (380, 1)])
def test_a_budget_too_small_for_confirm_leaves_the_study_incomplete(
    tmp_path: Path, budget: int, num_search: int
) -> None:
    plan = plan_of(load(tmp_path, f"search.step_budget={budget}", "confirm.seeds=5"))
    rows = run_all(plan)
    assert sum(row.stage is Stage.SEARCH for row in rows) == num_search
    assert plan.verdict is not None
    assert (plan.verdict.kind, plan.verdict.exit_code) == (VerdictKind.INCOMPLETE, 6)


def test_a_time_budget_is_counted_by_the_clock(tmp_path: Path) -> None:
    now = 0.0

    def slow(request: TrialRequest) -> TrialSummary:
        nonlocal now
        now += 1.0
        return pretend(request)

    plan = plan_of(load(tmp_path, "search.time_budget_s=20"), clock=lambda: now)
    rows = run_all(plan, slow)
    assert sum(row.stage is Stage.SEARCH for row in rows) == 3  # 7 pilot + 3 search = half of 20
    assert now <= 20


@pytest.mark.parametrize(
    ("finished", "expected"), [(0, 7), (3, 7), (7, 6), (9, 4), (12, 1), (13, 4)]
)
def test_as_many_trials_as_the_next_stage_has_could_run_at_once(
    tmp_path: Path, finished: int, expected: int
) -> None:
    plan = plan_of(load(tmp_path))
    for _ in range(finished):
        request = plan.next_trial()
        assert request is not None
        plan.finish(request, pretend(request), started_at="", node="")
    assert plan.num_at_once == expected


def test_a_second_pilot_puts_every_stabiliser_at_its_smallest_number(tmp_path: Path) -> None:
    def fail_at_first(request: TrialRequest) -> TrialSummary:
        is_first_sweep = request.stage is Stage.PILOT and request.index < 7
        return unstable_pilot(request) if is_first_sweep else pretend(request)

    def unstable_pilot(request: TrialRequest) -> TrialSummary:
        return TrialSummary(
            outcome=Outcome.PRUNED, num_planned_steps=request.config.num_planned_steps, num_steps=3
        )

    rows = run_all(plan_of(load(tmp_path)), fail_at_first)
    pilot = [row for row in rows if row.stage is Stage.PILOT]
    assert [row.settings["clip_norm"] for row in pilot] == [1.0] * 14
    assert len(pilot) == 14


def test_the_order_of_a_request_survives_its_way_to_the_worker(tmp_path: Path) -> None:
    request = plan_of(load(tmp_path)).next_trial()
    assert request is not None
    order = Order.from_text(request.to_text())
    assert (order.config, order.constants) == (request.config, request.constants)


def test_planned_work_bounds_what_a_study_takes(tmp_path: Path) -> None:
    space = load(tmp_path)
    trials, steps = planned_work(space)
    rows = run_all(plan_of(space))
    assert len(rows) <= trials
    assert sum(row.summary.num_steps for row in rows) <= steps


def test_another_pilot_trial_measures_the_blind_run_where_the_first_could_not(
    tmp_path: Path,
) -> None:
    plan = plan_of(load(tmp_path))
    first, second = plan.next_trial(), plan.next_trial()
    assert first is not None
    assert second is not None
    assert first.constants.measures_blind_run
    assert not second.constants.measures_blind_run
    failed = dataclasses.replace(lost(first), outcome=Outcome.OUT_OF_MEMORY)
    plan.finish(first, failed, started_at="", node="")
    third = plan.next_trial()
    assert third is not None
    assert third.constants.measures_blind_run


def test_a_demand_under_a_when_is_tried_where_it_applies(tmp_path: Path) -> None:
    path = write_space(
        tmp_path,
        text="task: {task}:Tiny\ntrial: {{steps: 20}}\nspace:\n"
        "  learning_rate: {{loguniform: {{low: 1e-4, high: 1.0}}}}\n"
        "  precision: {{choice: [fp32, fp16]}}\n"
        "  attention_clamp: {{choice: [null, 5.0], when: {{precision: fp16}}}}\n"
        "confirm: {{steps: 20}}\n",
    )
    first = plan_of(spaces.load(path)).next_trial()
    assert first is not None
    tried = {(c.engine.precision, c.engine.attention_clamp) for c in first.preflight}
    assert tried == {("fp32", None), ("fp16", 5.0)}
