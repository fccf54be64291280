"""Which term of the detector's loss goes NaN in fp16, and what each of its clamps cures."""

import dataclasses

import pytest

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.detector import CpeClamp, Detector
from stability_search.testing import Rehearsal, rehearse
from tests.field.cases.detector import ACCUMULATION, AS_WRITTEN, BATCH_SIZE, BEFORE, Setup, train

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
LOUD = 8.0  # times the initial weights: distributions over bins as sharp as late in training


def rehearse_guarded(
    task: Detector, setup: Setup, *, seed: int, num_steps: int, **more: object
) -> Rehearsal:
    chosen = {"precision": "fp16", "init_scale": setup.init_scale} | more
    settings = EngineSettings(learning_rate=setup.rate, clip_norm=setup.clip_norm, **chosen)
    return rehearse(
        task,
        settings,
        num_steps=num_steps,
        batch_size=BATCH_SIZE,
        accumulation_steps=ACCUMULATION,
        seed=seed,
    )


def broken_terms(record: StepRecord) -> list[str]:
    return [name for name, value in record.loss_terms.items() if value is None]


@pytest.mark.parametrize("seed", SEEDS)
def test_without_its_clamps_cpe_goes_nan_and_ends_a_loop_without_guards(seed: int) -> None:
    """At the team's rate, with its calls in the right order."""
    end = train(dataclasses.replace(AS_WRITTEN, task_args={}), seed, 30)
    assert end.failed_at is not None
    assert end.failure == "NaN loss"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_survives_it_at_the_same_settings_and_names_cpe(seed: int) -> None:
    task = Detector(use_distribution_focal=True)
    rehearsal = rehearse_guarded(task, BEFORE, seed=seed, num_steps=24)
    bad = [r for r in rehearsal.records if r.reason.startswith("loss term")]
    assert rehearsal.ended is None
    assert bad
    assert {(r.label, r.reason) for r in bad} == {(StepLabel.BAD, "loss term cpe is NaN")}
    assert {tuple(broken_terms(r)) for r in bad} == {("cpe",)}
    assert {r.first_nonfinite_phase for r in bad} == {"loss"}
    assert sum(r.is_applied for r in rehearsal.records) > 12


@pytest.mark.parametrize("seed", SEEDS)
def test_the_engine_names_the_distribution_focal_term(seed: int) -> None:
    task = Detector(use_cpe=False, use_distribution_focal=True)
    rehearsal = rehearse_guarded(task, AS_WRITTEN, seed=seed, num_steps=4, init_gain=LOUD)
    assert {r.label for r in rehearsal.records} == {StepLabel.BAD}
    assert {tuple(broken_terms(r)) for r in rehearsal.records} == {("distribution_focal",)}
    reasons = {r.reason for r in rehearsal.records}
    assert "loss term distribution_focal is NaN" in reasons
    assert reasons <= {f"loss term distribution_focal is {what}" for what in ("NaN", "Inf")}


@pytest.mark.parametrize("name", ["use_cpe", "use_distribution_focal"])
def test_both_terms_are_sound_in_fp32(name: str) -> None:
    """The twin: it is fp16 that they do not bear."""
    task = Detector(**{"use_cpe": False, name: True})  # type: ignore[arg-type]
    gain = LOUD if name == "use_distribution_focal" else 1.0
    rehearsal = rehearse_guarded(
        task, AS_WRITTEN, seed=0, num_steps=15, precision="fp32", init_gain=gain
    )
    assert {record.label for record in rehearsal.records} == {StepLabel.OK}


def rehearse_clamped(clamp: CpeClamp, **more: object) -> Rehearsal:
    setup = dataclasses.replace(AS_WRITTEN, rate=1e-3, init_scale=1024.0)
    task = Detector(cpe_clamp=clamp, **more)  # type: ignore[arg-type]
    return rehearse_guarded(task, setup, seed=0, num_steps=25)


def test_a_clamp_before_the_exponentials_cures_the_term() -> None:
    for clamp in ("similarity", "all"):
        assert {r.label for r in rehearse_clamped(clamp).records} == {StepLabel.OK}


def test_exponentials_in_fp32_cure_it_without_any_clamp() -> None:
    rehearsal = rehearse_clamped("none", cpe_precision="fp32")
    assert {record.label for record in rehearsal.records} == {StepLabel.OK}


def test_a_clamp_of_the_loss_cures_nothing() -> None:
    """The clamp of NaN is NaN."""
    rehearsal = rehearse_clamped("loss")
    bad = [record for record in rehearsal.records if record.label == StepLabel.BAD]
    assert {record.reason for record in bad} == {"loss term cpe is NaN"}
    assert len(bad) > 10


def test_a_clamp_of_the_exponentials_moves_the_nan_into_the_gradient() -> None:
    """No term is named any more, and the loss scale is blamed until it is gone."""
    rehearsal = rehearse_clamped("exponentials")
    assert rehearsal.ended == (Outcome.SCALE_COLLAPSE, "the loss scale fell to 0.5, below 1")
    assert all(record.is_loss_finite for record in rehearsal.records)
    assert not any(map(broken_terms, rehearsal.records))
