"""Where the ladder spends its trials, with trials that a test makes up."""

from collections.abc import Callable
from dataclasses import replace

import pytest

import stability_search.diagnose.ladder as ladder_module
from stability_search.diagnose.batch_statistics import BatchSieve, DataReport, DefectKind
from stability_search.diagnose.conclusion import conclude
from stability_search.diagnose.ends import Start, TrialEnd
from stability_search.diagnose.ladder import Ladder
from stability_search.diagnose.rungs import RungName
from stability_search.diagnose.verdict import Cause
from stability_search.errors import InfrastructureError, UsageError, UserCodeError
from stability_search.records.trial import Outcome
from stability_search.settings.trial import TrialConfig
from stability_search.tasks.loading import load_task
from tests.diagnose.cases import small
from tests.diagnose.test_verdict import CLEAN, fails, holds, stuck, with_defect

SEEDS = (10, 11, 12, 13, 14)
Judge = Callable[[TrialConfig], TrialEnd]


def climb(
    monkeypatch: pytest.MonkeyPatch,
    judge: Judge,
    *,
    start: Callable[[TrialConfig], Start] | None = None,
    data: DataReport = CLEAN,
    precision: str = "fp16",
) -> tuple[Ladder, Cause]:
    """Climb a ladder whose trials end as `judge` says."""
    fine = Start(delta=1.0, refusal="", error="", wall_s=0.0)
    monkeypatch.setattr(ladder_module, "first_step", start or (lambda _: fine))
    monkeypatch.setattr(
        ladder_module,
        "watch_trial",
        lambda config, **_: replace(judge(config), seed=config.seed),
    )
    case = small("", Cause.HEALTHY, "Recall", {"learning_rate": 0.1, "precision": precision})
    config = case.recipe.config(SEEDS[0])
    sieve = BatchSieve(load_task(config.task, config.task_args), {}, frozenset())
    ladder = Ladder(
        config, seeds=SEEDS, data=data, sieve=sieve, say=lambda _: None, check=lambda: None
    )
    return ladder, ladder.climb()[0]


def trials(ladder: Ladder, name: RungName) -> list[int]:
    result = ladder.results.get(name)
    return [] if result is None else [end.seed for end in result.ends]


def test_a_healthy_training_costs_three_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder, cause = climb(monkeypatch, lambda _: holds(level=1.0))
    assert cause is Cause.HEALTHY
    assert {name: trials(ladder, name) for name in ladder.results} == {
        RungName.AS_GIVEN: [10, 11, 12]
    }


def test_every_rung_is_tried_once_and_the_deciding_one_on_every_seed_that_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ladder, cause = climb(
        monkeypatch, lambda c: holds() if c.engine.precision == "fp32" else fails()
    )
    assert cause is Cause.MIXED_PRECISION
    assert trials(ladder, RungName.AS_GIVEN) == [10, 11, 12]
    assert trials(ladder, RungName.FP32) == [10, 11, 12]
    assert trials(ladder, RungName.RATE_TENTH) == [10]
    assert ladder.results[RungName.SMALLER_MODEL].left_out
    remedy = ladder.find_remedy(cause)
    assert remedy is not None
    assert remedy.rung.name is RungName.FP32  # nothing cheaper holds
    assert trials(ladder, RungName.BF16) == [10]


def test_a_cure_that_fails_on_another_seed_decides_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(config: TrialConfig) -> TrialEnd:
        if config.engine.learning_rate < 0.1:
            return holds()
        is_cured = config.engine.precision == "fp32" and config.seed == 10
        return holds() if is_cured else fails()

    ladder, cause = climb(monkeypatch, judge)
    assert cause is Cause.LEARNING_RATE
    assert trials(ladder, RungName.FP32) == [10, 11]
    assert trials(ladder, RungName.RATE_TENTH) == [10, 11, 12]


def test_rungs_are_tried_on_the_seeds_that_failed_and_more_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(config: TrialConfig) -> TrialEnd:
        is_bad = config.seed in {11, 14} and config.engine.precision == "fp16"
        return fails() if is_bad else holds()

    ladder, cause = climb(monkeypatch, judge)
    assert cause is Cause.MIXED_PRECISION
    assert trials(ladder, RungName.AS_GIVEN) == list(SEEDS)
    assert trials(ladder, RungName.FP32) == [11, 14]


def test_what_learns_late_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder, cause = climb(
        monkeypatch, lambda c: holds(level=1.0) if c.num_planned_steps > 200 else stuck()
    )
    assert cause is Cause.HEALTHY
    assert trials(ladder, RungName.LONGER) == [10]
    assert trials(ladder, RungName.FP32) == []
    assert any("slow, not broken" in note for note in ladder.notes)


def test_what_falls_by_noise_alone_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder, _ = climb(  # 1.99 is below the loss without progress, but not by 5 %
        monkeypatch, lambda c: replace(stuck(), last_level=1.99) if _is_long(c) else stuck()
    )
    assert ladder.is_soft
    assert not any("slow, not broken" in note for note in ladder.notes)


def _is_long(config: TrialConfig) -> bool:
    return config.num_planned_steps > 200


@pytest.mark.parametrize(
    ("end", "data", "words"),
    [
        (
            holds(num_data_steps=100, num_reference_steps=100, reference_place=(None, "loss")),
            CLEAN,
            (
                "300 of 300 steps were non-finite (NaN or Inf) with finite batches, for the "
                "untrained model in fp32 too: look at the task's loss and model (first seen in "
                "the loss), not at the data or a setting."
            ),
        ),
        (holds(level=None), CLEAN, "on 3 of 3 seeds the probe loss is NaN or Inf, at the end"),
        (
            replace(holds(level=None), first_probe=None),
            CLEAN,
            "the probe loss is NaN or Inf, before the first step already: look at what model",
        ),
        (
            holds(level=None),
            with_defect(DefectKind.NONFINITE, "probe"),
            "The data: a probe batch holds NaN or Inf",
        ),
    ],
)
def test_what_neither_setting_nor_training_batch_is_to_blame_for_is_said_after_three_trials(
    monkeypatch: pytest.MonkeyPatch, end: TrialEnd, data: DataReport, words: str
) -> None:
    ladder, cause = climb(monkeypatch, lambda _: end, data=data)
    verdict = conclude(ladder, cause, None, None)
    assert words in verdict.headline
    assert list(ladder.results) == [RungName.AS_GIVEN]
    assert not any("broke for their batch" in note for note in verdict.notes)
    assert not any("The guarded engine skips" in note for note in verdict.notes)


def test_what_fails_late_is_diagnosed_over_the_longer_horizon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(config: TrialConfig) -> TrialEnd:
        if config.engine.precision == "fp32":
            return stuck()
        return fails() if config.num_planned_steps > 200 else stuck()

    ladder, cause = climb(monkeypatch, judge)
    assert cause is Cause.MIXED_PRECISION
    assert ladder.config.num_planned_steps == 600


def test_the_rate_is_lowered_until_something_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    ladder, cause = climb(
        monkeypatch, lambda c: holds() if c.engine.learning_rate < 5e-4 else stuck()
    )
    assert cause is Cause.LEARNING_RATE
    remedy = ladder.find_remedy(cause)
    assert remedy is not None
    assert remedy.changes == {"learning_rate": 1e-4}
    assert "nothing breaks" in ladder.results[RungName.BATCH_SIZE_1].left_out


def test_a_rate_that_is_only_slower_is_not_lowered_further(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ladder, cause = climb(
        monkeypatch,
        lambda c: holds(level=3.0 if c.engine.learning_rate == 0.1 else 4.0),
    )
    assert cause is Cause.HEALTHY
    assert trials(ladder, RungName.RATE_TENTH) == [10]
    assert trials(ladder, RungName.RATE_HUNDREDTH) == []


def test_a_rung_that_the_engine_refuses_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(config: TrialConfig) -> Start:
        text = "the model has none" if config.engine.norm == "group" else ""
        return Start(delta=1.0, refusal=text, error="", wall_s=0.0)

    ladder, cause = climb(monkeypatch, lambda _: fails(), start=start)
    assert cause is Cause.NOT_FOUND
    assert ladder.results[RungName.GROUP_NORM].left_out == "the model has none"
    assert trials(ladder, RungName.GROUP_NORM) == []


def test_a_configuration_that_cannot_be_honoured_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = Start(delta=None, refusal="no attention to cap", error="", wall_s=0.0)
    with pytest.raises(UsageError, match="no attention to cap"):
        climb(monkeypatch, lambda _: holds(), start=lambda _: refused)


def broken(place: str, outcome: Outcome = Outcome.USER_ERROR) -> TrialEnd:
    return holds(error="KeyError: x", error_type="KeyError", error_place=place, outcome=outcome)


def test_a_task_that_fails_twice_in_one_place_is_to_be_mended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserCodeError, match="2 seeds, 2 in the same way: KeyError: x") as caught:
        climb(monkeypatch, lambda _: broken("task.py:7"))
    assert caught.value.exit_code == 5


def test_a_broken_machine_is_not_the_tasks_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfrastructureError):
        climb(monkeypatch, lambda _: broken("", Outcome.INFRASTRUCTURE))


def test_a_task_that_fails_with_every_seed_is_not_healthy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UserCodeError, match="3 seeds, 1 in the same way"):
        climb(monkeypatch, lambda c: broken(f"task.py:{c.seed}"))


def test_one_error_among_three_is_told_and_not_counted_as_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ladder, cause = climb(monkeypatch, lambda c: broken("a:1") if c.seed == 11 else holds())
    verdict = conclude(ladder, cause, None, None)
    assert verdict.headline.startswith("Healthy: 2 of 3 seeds")
    assert "One seed ended in the task: KeyError: x" in verdict.notes


@pytest.mark.parametrize(
    ("stuck_seeds", "words", "asks"),
    [
        ({12}, "on 1 of 3 seeds it learned nothing beyond a constant", "what differs between"),
        ({10, 12}, "on 2 of 3 seeds it learned nothing beyond a constant", "what differs between"),
        (set(SEEDS), "on 3 of 3 seeds it learned nothing beyond a constant", "can be told from"),
    ],
)
def test_a_note_on_what_was_not_learned_counts_the_seeds_it_is_true_of(
    monkeypatch: pytest.MonkeyPatch, stuck_seeds: set[int], words: str, asks: str
) -> None:
    ladder, cause = climb(
        monkeypatch, lambda c: stuck() if c.seed in stuck_seeds else holds(level=1.0)
    )
    assert cause is Cause.HEALTHY
    [note] = [one for one in conclude(ladder, cause, None, None).notes if "learned nothing" in one]
    assert words in note
    assert asks in note


def test_a_rung_that_names_no_cause_does_not_keep_the_rate_from_being_lowered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(config: TrialConfig) -> TrialEnd:
        return holds() if config.batch_size == 1 or config.engine.learning_rate < 5e-3 else fails()

    ladder, cause = climb(monkeypatch, judge)
    assert cause is Cause.LEARNING_RATE
    assert trials(ladder, RungName.BATCH_SIZE_1) == [10]
    assert trials(ladder, RungName.RATE_HUNDREDTH) == [10, 11, 12]
