"""One trial from its configuration to its summary, without Ray."""

import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stability_search.blind import BlindRun
from stability_search.engine import GuardedEngine
from stability_search.engine.losses import LossFn
from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import KillRule, TaskReference, TrialConfig, TrialConstants
from stability_search.trial import Clock, Faults, Progress, run_trial
from stability_search.yardstick import probe_steps

TINY = TaskReference(file=str(Path(__file__).with_name("tiny_task.py")), class_name="Tiny")
STEPS = 30


def configure(
    *,
    steps: int = STEPS,
    seed: int = 0,
    timeout_s: float = 60.0,
    behaviour: str = "fine",
    kill_rule: KillRule | None = None,
    **engine: object,
) -> TrialConfig:
    settings: dict[str, Any] = {"learning_rate": 0.01, **engine}
    return TrialConfig(
        task=TINY,
        task_args={"behaviour": behaviour},
        kill_rule=kill_rule or KillRule(),
        engine=EngineSettings(num_planned_steps=steps, **settings),
        batch_size=8,
        num_planned_steps=steps,
        timeout_s=timeout_s,
        seed=seed,
    )


def run(
    config: TrialConfig,
    constants: TrialConstants | None = None,
    *,
    faults: Faults | None = None,
    clock: Clock = time.perf_counter,
) -> tuple[list[Progress], TrialSummary]:
    generator = run_trial(
        config,
        constants=constants or TrialConstants(probe_steps=probe_steps(config.num_planned_steps)),
        faults=faults,
        clock=clock,
    )
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as end:
            return seen, end.value


class BreakWeights:
    """Make a weight so large at one step that the model overflows from there on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(
        self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
    ) -> tuple[list[Any], LossFn]:
        if step == self.step:
            with torch.no_grad():
                next(engine.model.parameters()).fill_(3e38)
                engine.model[3].weight.fill_(3e38)  # type: ignore[index]
        return window, loss_fn


def test_a_healthy_trial_completes_learns_and_reads_eleven_probes() -> None:
    seen, summary = run(configure())
    assert summary.outcome is Outcome.COMPLETED
    assert [p.record.step for p in seen] == list(range(1, STEPS + 1))
    assert (summary.num_steps, summary.num_judged_steps, summary.num_bad_steps) == (30, 30, 0)
    assert summary.probe_steps == (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30)
    assert len(summary.probe_batch_losses[0]) == 8
    assert summary.probe_losses[-1] < summary.probe_losses[0]  # type: ignore[operator]
    assert summary.metrics_last["error"] < summary.metrics_first["error"]  # type: ignore[operator]
    assert summary.judged_steps == tuple(range(1, STEPS + 1))
    assert summary.evidence < 1


def test_the_same_configuration_and_seed_repeat_bit_for_bit_and_another_seed_does_not() -> None:
    first, second, other = (run(configure(seed=seed))[1] for seed in (3, 3, 4))
    timings = {"train_s": 0.0, "wall_s": 0.0, "peak_memory_mib": 0.0}
    assert {**first.to_json(), **timings} == {**second.to_json(), **timings}
    assert first.judged_losses != other.judged_losses


def test_reading_the_probe_more_often_changes_nothing_else() -> None:
    few, many = (
        run(configure(), TrialConstants(probe_steps=steps))[1]
        for steps in ((0, STEPS), tuple(range(STEPS + 1)))
    )
    assert few.judged_losses == many.judged_losses
    assert few.probe_losses[-1] == many.probe_losses[-1]


OWN_PROBE = """\
from tests.tiny_task import Tiny


class OwnProbe(Tiny):
    def probe_loss(self, model, batch):
        return self.loss(model, batch)
"""


def test_a_summary_says_whether_the_task_has_a_probe_loss(tmp_path: Path) -> None:
    file = tmp_path / "own_probe.py"
    file.write_text(OWN_PROBE)
    own = replace(configure(), task=TaskReference(file=str(file), class_name="OwnProbe"))
    assert [run(config)[1].has_probe_loss for config in (configure(), own)] == [False, True]


def test_a_summary_survives_json() -> None:
    _, summary = run(configure(behaviour="nan_batch"))
    text = json.dumps(summary.to_json(), allow_nan=False)
    assert TrialSummary.from_json(json.loads(text)) == summary


def test_poisoned_batches_are_data_and_are_never_held_against_the_configuration() -> None:
    seen, summary = run(configure(behaviour="nan_batch"))
    assert summary.outcome is Outcome.COMPLETED
    assert (summary.num_data_steps, summary.num_bad_steps) == (3, 0)
    found = [p.record.batch_index for p in seen if p.record.label is StepLabel.DATA]
    assert found == [9, 19, 29]
    assert summary.num_judged_steps == STEPS - 3
    assert summary.judged_steps[8:10] == (9, 11)


def test_a_model_that_breaks_is_killed_after_three_bad_steps_in_a_row() -> None:
    seen, summary = run(configure(), faults=BreakWeights(1))
    assert summary.outcome is Outcome.PRUNED
    assert [p.record.label for p in seen] == [StepLabel.BAD] * 3
    # E after three bad steps at the start, T = 30 instead of the 773 of T = 200.
    assert seen[-1].record.evidence == pytest.approx(summary.evidence)
    assert summary.evidence >= 100
    assert "3 bad steps of 3" in summary.reason
    assert summary.first_bad_step == 1
    assert summary.bad_steps == (1, 2, 3)
    assert summary.first_nonfinite_phase == "forward"


def test_the_kill_rule_of_the_configuration_decides() -> None:
    lenient = configure(kill_rule=KillRule(bad_rate=0.5, false_kill=1e-9))
    _, summary = run(lenient, faults=BreakWeights(1))
    assert summary.num_steps > 3


def test_max_bad_steps_ends_a_trial_as_pruned() -> None:
    _, summary = run(configure(max_bad_steps=1), faults=BreakWeights(4))
    assert (summary.outcome, summary.reason, summary.num_steps) == (
        Outcome.PRUNED,
        "max_bad_steps",
        4,
    )


def test_a_loss_that_stays_far_above_its_start_ends_at_step_70_as_diverged() -> None:
    constants = TrialConstants(e0=1.0, delta=1.0, probe_steps=probe_steps(100))
    config = configure(steps=100, behaviour="diverge")
    _, summary = run(config, constants)
    assert (summary.outcome, summary.num_steps) == (Outcome.DIVERGED, 70)


def test_without_a_delta_there_is_no_loss_stop() -> None:
    _, summary = run(configure(steps=80, behaviour="diverge"))
    assert summary.outcome is Outcome.COMPLETED


def test_a_scale_that_falls_below_one_is_a_scale_collapse() -> None:
    class Overflow:
        def before_step(
            self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
        ) -> tuple[list[Any], LossFn]:
            if step == 1:
                for parameter in engine.model.parameters():
                    parameter.register_hook(lambda gradient: gradient * math.inf)
            return window, loss_fn

    config = configure(precision="fp16", init_scale=4.0)
    _, summary = run(config, faults=Overflow())
    assert summary.outcome is Outcome.SCALE_COLLAPSE
    assert summary.num_steps == 3  # 4, 2, 1


def test_an_error_of_the_task_is_a_user_error_with_its_place() -> None:
    _, summary = run(configure(behaviour="raise"))
    assert summary.outcome is Outcome.USER_ERROR
    assert summary.error_type == "KeyError"
    assert "tiny_task.py" in summary.error_place
    assert "a bug of the user's" in summary.error_text
    assert summary.num_steps == 4


def test_an_exception_caused_by_a_non_finite_output_is_a_bad_step() -> None:
    config = configure(behaviour="raise_nan")
    seen, summary = run(config, faults=BreakWeights(1))
    assert summary.outcome is Outcome.PRUNED
    assert seen[-1].record.label is StepLabel.BAD
    assert "ValueError" in seen[-1].record.reason


def test_batches_that_run_out_are_a_user_error() -> None:
    _, summary = run(configure(behaviour="end"))
    assert summary.outcome is Outcome.USER_ERROR
    assert "endless" in summary.reason


def test_running_out_of_memory_has_its_own_name() -> None:
    _, summary = run(configure(behaviour="out_of_memory"))
    assert summary.outcome is Outcome.OUT_OF_MEMORY
    assert summary.error_type == ""


def test_a_trial_over_its_time_limit_ends_between_two_steps() -> None:
    ticks: Iterator[float] = (float(n) for n in itertools.count())
    _, summary = run(configure(timeout_s=10.0), clock=lambda: next(ticks))
    assert summary.outcome is Outcome.TIMED_OUT
    assert 0 < summary.num_steps < STEPS


def test_a_task_that_cannot_be_built_is_a_user_error() -> None:
    _, summary = run(replace(configure(), task_args={"no_such_argument": 1}))
    assert summary.outcome is Outcome.USER_ERROR
    assert "no_such_argument" in summary.error_text


def test_the_blind_run_is_measured_where_the_task_has_no_baseline() -> None:
    constants = TrialConstants(probe_steps=(0, STEPS), measures_blind_run=True)
    _, summary = run(configure(), constants)
    assert summary.baseline is None
    # Ignoring the input, nothing beats the variance of the targets around their mean.
    targets = torch.cat([y for _, y in _held_out()])
    best = float(targets.var(correction=0))
    assert summary.blind_loss == pytest.approx(best, rel=0.01)
    assert len(summary.blind_batch_losses) == 8


def test_measuring_the_blind_run_does_not_change_the_trial() -> None:
    plain = run(configure())[1]
    blind = run(
        configure(), TrialConstants(probe_steps=probe_steps(STEPS), measures_blind_run=True)
    )[1]
    assert plain.judged_losses == blind.judged_losses


def _held_out() -> list[tuple[torch.Tensor, torch.Tensor]]:
    from stability_search.tasks.loading import load_task

    return list(load_task(TINY, {}).probe())  # type: ignore[arg-type]


def test_metrics_that_a_broken_model_breaks_do_not_hide_why_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stability_search.tasks.loading import load_task

    config = configure()
    task = load_task(config.task, config.task_args)
    monkeypatch.setattr(
        type(task), "metrics", lambda _, model, batch: {"n": int(model(batch[0]).sum() * math.inf)}
        if not model[3].weight.abs().max() < 1e30 else {"n": 0.0},
    )  # fmt: skip
    _, summary = run(config, faults=BreakWeights(1))
    assert summary.outcome is Outcome.PRUNED
    assert any("metrics failed" in warning for warning in summary.warnings)


def test_a_blind_run_whose_loss_cannot_be_computed_is_only_missing() -> None:
    constants = TrialConstants(probe_steps=(0, STEPS), measures_blind_run=True)
    _, summary = run(configure(behaviour="needs_weights"), constants)
    assert summary.outcome is Outcome.COMPLETED
    assert summary.blind_loss is None
    assert summary.has_measured_blind_run


def test_the_blind_run_does_not_count_against_the_time_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def slow(*_: object) -> BlindRun:
        nonlocal now
        now += 1000
        return BlindRun(loss=None, batch_losses=())

    monkeypatch.setattr("stability_search.trial.run_blind", slow)
    constants = TrialConstants(probe_steps=(0, STEPS), measures_blind_run=True)
    _, summary = run(configure(timeout_s=10.0), constants, clock=lambda: now)
    assert summary.outcome is Outcome.COMPLETED


def test_asking_the_reference_leaves_python_s_and_numpy_s_random_state_alone() -> None:
    import random

    import numpy as np

    drawn: list[tuple[float, float]] = []

    class Draw(BreakWeights):
        def before_step(
            self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
        ) -> tuple[list[Any], LossFn]:
            drawn.append((random.random(), float(np.random.rand())))  # noqa: NPY002, S311
            return super().before_step(step, engine, window, loss_fn)

    run(configure(max_bad_steps=3, kill_rule=KillRule(false_kill=1e-9)), faults=Draw(4))
    broken = list(drawn)
    drawn.clear()
    run(configure(), faults=Draw(10**9))
    assert broken == drawn[: len(broken)]


def test_a_broken_card_is_infrastructure_and_an_exit_is_the_user_s() -> None:
    from stability_search.trial import _outcome_of

    assert _outcome_of(RuntimeError("CUDA error: uncorrectable ECC error encountered")) is (
        Outcome.INFRASTRUCTURE
    )
    assert _outcome_of(RuntimeError("CUDA error: device-side assert triggered")) is (
        Outcome.USER_ERROR
    )
    assert _outcome_of(SystemExit(1)) is Outcome.USER_ERROR


def test_what_cannot_be_looked_at_is_a_warning_and_changes_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, seen = run(configure())

    def cannot(_: object) -> list[torch.Tensor]:
        raise NotImplementedError("amax of this kind of tensor")

    monkeypatch.setattr("stability_search.engine.window._largest", cannot)
    _, unseen = run(configure())

    assert seen.warnings == ()
    (warning,) = unseen.warnings
    assert warning.startswith("The model's output is not fully observed (NotImplementedError: ")
    assert unseen.judged_losses == seen.judged_losses
    assert unseen.outcome is Outcome.COMPLETED


@pytest.mark.parametrize(
    ("tried", "outcome"),
    [
        ({"at_step": 1, "behaviour": "raise"}, Outcome.COMPLETED),
        ({"no_such_argument": 1}, Outcome.USER_ERROR),
    ],
)
def test_trying_a_setting_costs_the_trial_only_where_it_cannot_be_honoured(
    tried: dict[str, Any], outcome: Outcome
) -> None:
    """An error of the task under another configuration is for that one's own trial to show."""
    config = configure(steps=5)
    generator = run_trial(
        config,
        constants=TrialConstants(probe_steps=probe_steps(5)),
        preflight=(replace(config, task_args=tried),),
    )
    while True:
        try:
            next(generator)
        except StopIteration as end:
            summary: TrialSummary = end.value
            break
    assert summary.outcome is outcome
    assert (summary.error_type == "UsageError") == (outcome is Outcome.USER_ERROR)
