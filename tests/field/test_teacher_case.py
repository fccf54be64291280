"""Report 2: the fusion overflows in fp16, the loss goes NaN, and what of the cure acts."""

import math
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import nn

from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.tasks.teacher import Teacher
from tests.field.cases.plain_training import PlainTraining
from tests.field.cases.teacher import (
    CASE,
    CLIP_BEFORE,
    INIT_SCALE,
    RATE_BEFORE,
    RATE_GIVEN,
    TASK_ARGS,
    new_training,
    rate_that_runs,
    train_with_the_cure,
    train_without_checks,
)
from tests.field.guarded_teacher import first_configuration, train_guarded

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
NUM_STEPS = 30


@pytest.fixture(autouse=True)
def _leave_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def test_the_case_fails_under_the_first_configuration_of_its_space() -> None:
    config = first_configuration(CASE.space)
    assert config.task_args == {**config.task_args, **TASK_ARGS, "variant": "original"}
    assert config.engine.learning_rate == RATE_BEFORE
    assert config.engine.clip_norm == CLIP_BEFORE
    assert config.engine.init_scale == INIT_SCALE
    assert (config.batch_size, config.accumulation_steps) == (2, 1)


# -- the failure -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_goes_nan_within_five_steps(seed: int) -> None:
    end = CASE.unguarded(seed, NUM_STEPS)
    assert end.failure.startswith("NaN loss in ")
    assert end.failed_at is not None
    assert end.failed_at <= 5
    assert end.num_skipped >= 10


def test_the_scaler_takes_each_nan_for_its_own_and_halves_itself_to_death() -> None:
    steps = list(islice(train_without_checks(new_training(0, "original")), NUM_STEPS))
    num_nan = sum(not math.isfinite(step.loss) for step in steps[:-1])
    assert steps[-1].scale < 1
    assert steps[-1].scale >= INIT_SCALE / 2 ** (num_nan + 3)  # three overflows of its own


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_names_the_fusion_at_the_same_settings_and_spares_the_scale(seed: int) -> None:
    summary, records = train_guarded(first_configuration(CASE.space, seed=seed))
    assert summary.outcome is Outcome.PRUNED
    assert summary.num_steps <= 5
    assert summary.first_nonfinite_module == "fusion.attention"
    assert summary.first_nonfinite_phase == "forward"
    num_overflows = sum(record.label is StepLabel.CALIBRATION for record in records)
    assert summary.final_scale == INIT_SCALE / 2**num_overflows
    assert summary.are_parameters_finite


@pytest.mark.parametrize(
    ("engine", "task_args"),
    [
        ({"learning_rate": 1e-6}, {}),
        ({"clip_norm": 0.5}, {}),
        ({"attention_clamp": 10.0}, {}),
        ({"norm": "group"}, {}),
        ({}, {"dropout": 0.5, "attention_dropout": 0.3}),
        ({}, {"heads": 2}),
        ({}, {"hidden": 16, "blocks": 1}),
    ],
    ids=["rate", "clip", "clamp", "group_norm", "dropout", "heads", "smaller"],
)
def test_what_acts_after_the_first_forward_pass_or_elsewhere_does_not_save_it(
    engine: dict[str, object], task_args: dict[str, object]
) -> None:
    summary, _ = train_guarded(first_configuration(CASE.space), engine=engine, **task_args)
    assert summary.outcome is Outcome.PRUNED
    assert summary.num_steps <= 5
    assert summary.first_nonfinite_module == "fusion.attention"


@pytest.mark.parametrize(
    ("engine", "task_args"),
    [
        ({}, {"variant": "stable"}),
        ({"init_gain": 0.5}, {}),
        ({}, {"fusion": "weighted_sum", "attention_dropout": None, "heads": None}),
        ({}, {"input_scale": 1.0}),
        ({"attention_logit_cap": 30.0}, {}),
        ({"attention_precision": "fp32"}, {}),
        ({"precision": "bf16"}, {}),
        ({"precision": "fp32"}, {}),
    ],
    ids=["stable", "init", "no_attention", "data", "cap", "attention_fp32", "bf16", "fp32"],
)
def test_smaller_logits_or_a_wider_range_save_it(
    engine: dict[str, object], task_args: dict[str, object]
) -> None:
    summary, _ = train_guarded(first_configuration(CASE.space), engine=engine, **task_args)
    assert (summary.outcome, summary.num_bad_steps) == (Outcome.COMPLETED, 0)


# -- the cure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cure_survives_as_written_and_as_meant(seed: int) -> None:
    for fix in (CASE.fix_as_written, CASE.fix_as_meant):
        end = fix(seed, NUM_STEPS)
        assert (end.failed_at, end.num_steps) == (None, NUM_STEPS)
        assert end.probe_loss is not None


def test_one_rate_is_replaced_in_silence_by_the_script_and_by_the_engine_none() -> None:
    assert rate_that_runs(RATE_GIVEN) == 2 * RATE_GIVEN
    assert [rate_that_runs(rate) for rate in (1e-6, 1e-5, 1e-4, 2e-4)] == [1e-6, 1e-5, 1e-4, 2e-4]
    config = first_configuration(CASE.space)
    _, records = train_guarded(config, engine={"learning_rate": RATE_GIVEN})
    assert {record.learning_rate for record in records} == {RATE_GIVEN}


def test_clipping_before_unscaling_always_acts() -> None:
    """Even at a threshold that no gradient of this model comes near."""
    clip_norm = 100.0
    clipped = {}
    for unscales_first in (False, True):
        loop = train_with_the_cure(
            PlainTraining(Teacher(variant="stable"), seed=0),
            rate=1e-4,
            unscales_first=unscales_first,
            clip_norm=clip_norm,
        )
        norms = [step.norm for step in islice(loop, 20) if math.isfinite(step.norm)]
        clipped[unscales_first] = [norm > clip_norm for norm in norms]
    assert len(clipped[False]) > 10
    assert all(clipped[False])
    assert not any(clipped[True])


def mean_update(*, unscales_first: bool, eps: float, **task_args: int) -> float:
    """Return the mean size of the first update over the learning rate: 1 for Adam's own."""
    rate, clip_norm = 1e-4, 1.0
    training = PlainTraining(Teacher(variant="stable", **task_args), seed=0)  # type: ignore[arg-type]
    model = training.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, eps=eps, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    scaler.scale(training.task.loss(model, next(training.stream()))).backward()
    if unscales_first:
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    scaler.step(optimizer)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    return ((after - before).abs().mean() / rate).item()


@pytest.mark.parametrize(
    ("task_args", "share"),
    [({}, 0.52), ({"hidden": 256}, 0.23), ({"hidden": 512, "heads": 8, "blocks": 6}, 0.12)],
    ids=["11 thousand parameters", "0.7 million", "5.3 million"],
)
def test_clipping_before_unscaling_is_a_hidden_cut_of_the_rate(
    task_args: dict[str, int], share: float
) -> None:
    """A norm of 1 over a scale of 65536 leaves gradients near Adam's eps.

    The more parameters share it, the nearer. A smaller eps shows that nothing else is at work.
    """
    written = mean_update(unscales_first=False, eps=1e-8, **task_args)
    meant = mean_update(unscales_first=True, eps=1e-8, **task_args)
    assert written == pytest.approx(share, abs=0.02)
    assert meant == pytest.approx(1, abs=0.02)
    assert mean_update(unscales_first=False, eps=1e-16, **task_args) == pytest.approx(1, abs=0.02)
