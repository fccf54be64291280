"""Every fault scenario shows the guard named for it, and the fix named for it survives.

Here one seed of each, the longest in a shorter form; all of them with five seeds are marked slow.
"""

import math
from collections.abc import Iterator

import pytest
import torch

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from tests.scenarios import adam_eps, attention_growth, ctc_targets, divergence, edge, loss_scale
from tests.scenarios.running import Evidence, run
from tests.scenarios.table import REQUIRED, SCENARIOS, markdown, missed, play, share
from tests.scenarios.tasks import Regression, Transcription

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("one_torch_thread")]


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Train such small matrices on one thread: two only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_holds(evidence: Evidence) -> None:
    print(evidence.figures)
    assert evidence.is_guard_shown, evidence.figures
    assert evidence.is_sign_absent, evidence.figures
    assert all(evidence.fixes.values()), (evidence.fixes, evidence.figures)


@pytest.mark.parametrize(
    "name", ["divergence", "loss_scale", "fp16_attention", "ctc_targets", "adam_eps"]
)
def test_the_guard_shows_only_with_the_fault_and_the_fix_survives(name: str) -> None:
    assert_holds(SCENARIOS[name].play(0))


@pytest.mark.timeout(120)
def test_growing_attention_logits_are_seen_before_anything_is_nan() -> None:
    assert_holds(attention_growth.scenario(0, steps=150, faults=(-2,), sound=(-8,)))


@pytest.mark.timeout(240)
def test_the_score_leaves_the_learning_rate_that_dies_after_the_loss_has_picked_it() -> None:
    # A rate further up dies sooner, so that a shorter training shows the same.
    extent = edge.Extent(short=80, long=200, ladder=(1, 3), cures=("logit cap 30",))
    assert_holds(edge.scenario(0, extent))


# -- each guard's twin: with the guard off, the sign is gone or the fault is misjudged ------------


def test_without_a_yardstick_a_loss_of_hundreds_trains_on() -> None:
    training = attention_growth.recipe(divergence.STEPS)
    trial = run(training.config(0, learning_rate=2.0**2))
    assert trial.summary.outcome is Outcome.COMPLETED
    assert max(loss or 0.0 for loss in trial.summary.judged_losses) > 100


@pytest.mark.parametrize("power", loss_scale.TOO_HIGH)
def test_a_kill_rule_that_hears_of_every_overflow_kills_at_the_third_step(power: int) -> None:
    trial = run(loss_scale.RECIPE.config(0, init_scale=2.0**power))
    assert loss_scale.killed_at_if_every_overflow_counted(trial) == 3
    assert trial.summary.outcome is Outcome.COMPLETED


@pytest.mark.parametrize("defect", ctc_targets.DEFECTS)
def test_without_a_reference_a_target_that_does_not_fit_is_blamed_on_the_model(
    defect: str,
) -> None:
    task = Transcription(defect=defect, defect_every=1)
    batch = next(task.batches(4, torch.Generator().manual_seed(0)))
    labels = []
    for reference in (None, task.model):
        torch.manual_seed(0)
        settings = EngineSettings(learning_rate=1e-2)
        with GuardedEngine(task.model(), settings, reference=reference) as engine:
            labels.append(engine.step([batch], task.loss).label)
    assert labels == [StepLabel.BAD, StepLabel.DATA]


@pytest.mark.parametrize(
    ("eps", "is_fused", "are_finite"),
    [(1e-8, False, False), (1e-4, False, True), (1e-8, True, True)],
)
def test_plain_adam_breaks_half_precision_parameters_at_once_unless_it_is_fused(
    eps: float, *, is_fused: bool, are_finite: bool
) -> None:
    torch.manual_seed(0)
    task = Regression(is_half=True)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=eps, fused=is_fused)
    task.loss(model, next(task.batches(16, torch.Generator().manual_seed(0)))).backward()
    optimizer.step()
    norm = torch.nn.utils.get_total_norm(list(model.parameters())).item()
    assert math.isfinite(norm) is are_finite


def test_half_precision_weights_train_at_the_default_eps_with_the_engine_as_it_is() -> None:
    trial = run(adam_eps.RECIPE.config(0))
    assert trial.has_survived
    assert trial.has_learned


def test_a_scenario_whose_guard_did_not_show_is_counted_as_missed() -> None:
    good = Evidence(
        seed=0, is_guard_shown=True, is_sign_absent=True, fixes={"a": True}, figures=""
    )
    bad = Evidence(
        seed=1, is_guard_shown=True, is_sign_absent=True, fixes={"a": False}, figures="x"
    )
    found = {"edge": [good, bad]}
    assert share(found) == 0.5
    assert missed(found) == [
        "edge, seed 1: guard shown True, absent without the fault True, fixes {'a': False}; x"
    ]
    assert "| 2/2 | 2/2 | a: 1/2 |" in markdown(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nine_of_ten_scenarios_hold_over_five_seeds() -> None:
    found = play(SCENARIOS, range(5))
    print(markdown(found))
    assert share(found) >= REQUIRED, missed(found)
