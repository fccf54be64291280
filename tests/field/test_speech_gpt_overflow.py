"""A NaN loss in fp16 that no loss scaler cures: the forward pass overflows; the engine says where.

A token model trained in fp16 is sound at step 0 and NaN by step 50. The team put in a smaller loss
scale that grows sooner, skipped NaN batches and clipped. From the first NaN on nearly every batch
is one, and a scale that is halved for each ends at 0.
"""

import itertools
import math

import pytest
import torch

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.engine import EngineSettings
from tests.field.cases.speech_gpt import (
    AS_IT_FAILED,
    AS_MEANT,
    AS_WRITTEN,
    CASE,
    RATE,
    ScalerUse,
    TokenTraining,
    task,
    train,
)

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
ADVISED = (512.0, 2048.0)  # the scales the team advises
WIDE_LAYERS = ("blocks.0.narrow", "blocks.1.narrow")


# -- the team's loops ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_is_finite_at_first_and_nan_by_step_50(seed: int) -> None:
    end = CASE.unguarded(seed, 50)
    assert end.failed_at is not None
    assert 10 < end.failed_at <= 50
    assert end.failure.startswith("NaN loss")


@pytest.mark.parametrize("use", [AS_WRITTEN, AS_MEANT], ids=["as written", "as meant"])
def test_the_teams_scaler_fails_at_the_same_step(use: ScalerUse) -> None:
    """Another scale, clipping and skips: the forward pass knows of none of them."""
    failed_at = [first_nan(TokenTraining(task(), 0), other) for other in (AS_IT_FAILED, use)]
    assert failed_at[0] == failed_at[1]


def first_nan(training: TokenTraining, use: ScalerUse) -> int:
    steps = enumerate(train(training, use), start=1)
    return next(index for index, step in steps if not math.isfinite(step.loss))


def test_skipping_does_not_bring_training_back() -> None:
    """Good batches push the activations up until there is no good batch any more."""
    training = TokenTraining(task(), 1)
    steps = list(itertools.islice(train(training, AS_MEANT), 90))
    assert sum(step.is_skipped for step in steps[40:]) >= 45
    assert {step.scale for step in steps} == {1024.0}
    loss = training.probe_loss()
    assert loss is not None  # in fp32 the same parameters are sound
    assert loss > training.task.baseline()  # but worse than ignoring the input


def test_a_scale_that_is_halved_for_each_of_them_collapses() -> None:
    steps = list(itertools.islice(train(TokenTraining(task(), 1), AS_WRITTEN), 50))
    assert steps[0].scale == 1024.0
    assert steps[-1].scale < 1


def test_the_same_loop_trains_where_activations_are_small() -> None:
    """The twin: what overflows is the residual stream, not the loop or the data."""
    training = TokenTraining(task(residual_scale=1.0), 0)
    losses = [step.loss for step in itertools.islice(train(training, AS_IT_FAILED), 50)]
    assert all(map(math.isfinite, losses))


# -- the scale they advise -------------------------------------------------------------------


def scales(init_scale: float, growth_interval: int, num_steps: int) -> list[float]:
    """Return the scale of torch's own scaler after each of so many clean steps."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale, growth_interval=growth_interval)
    found = []
    for _ in range(num_steps):
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(scaler.get_scale())
    return found


def test_a_growth_interval_of_100_leaves_the_advised_range_at_step_200() -> None:
    found = dict(enumerate(scales(1024.0, 100, 500), start=1))
    assert [found[step] for step in (99, 100, 200, 500)] == [1024, 2048, 4096, 32768]
    assert all(ADVISED[0] <= found[step] <= ADVISED[1] for step in range(1, 200))
    assert not any(ADVISED[0] <= found[step] <= ADVISED[1] for step in range(200, 501))


def test_with_torchs_own_interval_it_stays_for_3999_steps() -> None:
    """The interval says when the scale rises; it does not look for NaN more or less often."""
    found = scales(1024.0, 2000, 4000)
    assert (found[1998], found[1999], found[3998], found[3999]) == (1024, 2048, 2048, 4096)


# -- the engine ------------------------------------------------------------------------------


def train_guarded(seed: int, num_steps: int, **more: object) -> tuple[list[StepRecord], float]:
    """Train under the engine; return its records and the mean probe loss."""
    training = TokenTraining(task(), seed)

    def reference() -> torch.nn.Module:
        torch.manual_seed(seed)
        return task().model()

    chosen = {"learning_rate": RATE, "precision": "fp16", "clip_norm": 1.0} | more
    with GuardedEngine(
        training.model,
        EngineSettings(**chosen),
        reference=reference,
        init_gain_names=task().init_gain_parameters(training.model),
    ) as engine:
        batches = itertools.islice(training.batches, num_steps)
        records = [engine.step([batch], task().loss) for batch in batches]
        losses = engine.evaluate(task().probe(), task().loss)
    assert engine.ended is None
    return records, sum(losses) / len(losses)


AFTER = {"init_scale": 1024.0, "growth_interval": 100, "max_scale": 2048.0}


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_goes_on_and_names_what_overflowed(seed: int) -> None:
    records, _ = train_guarded(seed, 40, **AFTER)
    bad = [record for record in records if record.label is StepLabel.BAD]
    assert {record.label for record in records} == {StepLabel.OK, StepLabel.BAD}
    assert 10 < bad[0].step <= 50
    assert bad[0].reason == "model output is NaN"
    assert bad[0].first_nonfinite_module in WIDE_LAYERS
    assert bad[0].first_nonfinite_phase == "forward"
    assert not any(record.is_transient for record in bad)
    assert {record.scale for record in records} == {1024.0}  # it is no overflow of the scale


@pytest.mark.parametrize("seed", SEEDS)
def test_a_smaller_start_of_the_residual_stream_is_calm_in_fp16(seed: int) -> None:
    """A sixteenth of the activations, the same function, five times the rate."""
    records, loss = train_guarded(seed, 60, init_gain=1 / 16, learning_rate=5 * RATE, **AFTER)
    assert {record.label for record in records} == {StepLabel.OK}
    assert loss < task().baseline()


def test_fp32_is_calm() -> None:
    records, loss = train_guarded(0, 60, precision="fp32", learning_rate=5 * RATE)
    assert {record.label for record in records} == {StepLabel.OK}
    assert loss < task().baseline()


def test_attention_is_not_where_it_breaks() -> None:
    for more in ({"attention_logit_cap": 30.0}, {"attention_precision": "fp32"}):
        records, _ = train_guarded(0, 40, **more)
        assert StepLabel.BAD in {record.label for record in records}


def test_a_lower_rate_fails_later_and_has_not_learned_by_then() -> None:
    """So a calm short run at a low rate says little about a longer one."""
    records, loss = train_guarded(0, 110, learning_rate=RATE / 5)
    first = next(record.step for record in records if record.label is StepLabel.BAD)
    assert first > 50
    assert loss > task().baseline()
