"""The overfit test: what passes, and what is said where it does not."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stability_search.cli import main
from stability_search.diagnose.overfit import Goal, Overfit, overfit
from stability_search.diagnose.verdict import Cause
from tests.diagnose.cases import Case, small
from tests.diagnose.tasks import Crowd, Pair, Sines


class Signs(Sines):
    """Tells whether the first number is positive; measures accuracy and an error rate.

    Args:
        has_nan: Every batch holds a NaN.
    """

    def __init__(self, *, has_nan: bool = False) -> None:
        super().__init__()
        self._has_nan = has_nan

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Pair]:
        for inputs, _ in super().batches(batch_size, generator):
            labels = (inputs[:, :1] > 0).float()
            if getattr(self, "_has_nan", False):
                inputs[0, 0] = torch.nan
            yield inputs, labels

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]).float(), batch[1])

    def metrics(self, model: nn.Module, batch: Pair) -> dict[str, float]:
        share = float(((model(batch[0]) > 0) == (batch[1] > 0)).float().mean())
        return {"accuracy": share, "sign_error_rate": 1 - share}


class Broken(Signs):
    """Has a loss that no sample of it can be blamed for."""

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        return super().loss(model, batch) * math.nan


class PerCent(Signs):
    """Measures its accuracy in per cent.

    Args:
        first: Readings to begin with, in turn, instead of those measured.
        is_stuck: Nothing is learned.
    """

    def __init__(self, *, first: tuple[float, ...] = (), is_stuck: bool = False) -> None:
        super().__init__()
        self._first = list(first)
        self._is_stuck = is_stuck

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        loss = super().loss(model, batch)
        return loss * 0.0 if self._is_stuck else loss

    def metrics(self, model: nn.Module, batch: Pair) -> dict[str, float]:
        share = super().metrics(model, batch)["accuracy"]
        return {"top1_accuracy": self._first.pop(0) if self._first else 100 * share}


class Aloof(Crowd):
    """Known by heart with the batch's own statistics, while the running ones never move."""

    def model(self) -> nn.Module:
        model = super().model()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0
        return model


def run(case: Case, accumulation_steps: int = 1) -> Overfit:
    config = replace(case.recipe.config(0), accumulation_steps=accumulation_steps)
    return overfit(config, say=lambda _: None, check=lambda: None)


def case(
    task_class: str,
    rate: float = 1e-2,
    *,
    module: str = __name__,
    steps: int = 200,
    **args: object,
) -> Case:
    engine = {"learning_rate": rate}
    return small(
        "",
        Cause.HEALTHY,
        task_class,
        engine,
        module=module,
        batch_size=8,
        steps=steps,
        **args,
    )


@pytest.mark.fault
def test_samples_that_are_learned_by_heart_pass_by_their_metrics() -> None:
    result = run(case("Signs"))
    assert result.has_passed
    assert result.exit_code == 0
    assert result.goals == ("sign_error_rate at most 0", "accuracy at least 1")
    assert result.last["accuracy"] == 1.0
    assert 1 < result.num_steps < 1000
    assert "learned by heart" in result.lines()[0]
    assert json.loads(result.to_json())["schema"] == "stability-search/overfit/1"


@pytest.mark.fault
def test_an_accuracy_in_per_cent_must_reach_100() -> None:
    stuck = run(case("PerCent", is_stuck=True, steps=20))
    assert not stuck.has_passed
    assert stuck.goals == ("top1_accuracy at least 100",)
    (note,) = stuck.notes
    assert note.startswith(
        "`top1_accuracy` was above 1, so it is in per cent, and its goal is 100"
    )
    learned = run(case("PerCent"))
    assert learned.has_passed
    assert learned.last["top1_accuracy"] == 100.0
    assert learned.notes == stuck.notes


@pytest.mark.fault
def test_per_cent_is_noticed_in_a_single_batch_and_whenever_it_shows() -> None:
    """Nothing right at first, then 1 per cent on average: as a share it would be all of them."""
    stuck = run(case("PerCent", first=(0.0, 0.0, 2.0, 0.0), is_stuck=True), accumulation_steps=2)
    assert not stuck.has_passed
    assert stuck.goals == ("top1_accuracy at least 100",)


@pytest.mark.fault
def test_a_rate_that_moves_nothing_gets_stuck_and_a_higher_one_is_advised() -> None:
    result = run(case("Signs", 1e-9, steps=100))
    assert (result.exit_code, result.num_steps) == (3, 500)
    assert result.reason == "it got stuck"
    assert any("a higher rate than 1e-09" in text for text in result.advice)


@pytest.mark.fault
def test_a_task_without_such_metrics_is_judged_by_its_loss_and_told_what_to_add() -> None:
    result = run(case("Sines", module="tests.diagnose.tasks"))
    assert result.has_passed
    (goal,) = result.goals
    assert goal.startswith("loss at most 0.")
    assert any("`error_rate` or `accuracy`" in note for note in result.notes)


@pytest.mark.fault
def test_a_broken_batch_or_step_ends_it_at_once() -> None:
    result = run(case("Signs", has_nan=True))
    assert (result.bad_step, result.num_steps) == (1, 1)
    assert result.reason.startswith("step 1 was data: NaN in batch")
    assert result.advice == ("mend these samples: the batch itself is at fault",)
    result = run(case("Broken"))
    assert result.advice == ("look at the task's loss and model: the samples are finite",)
    wild = small("", Cause.HEALTHY, "Sines", {"learning_rate": 1e3, "optimizer": "sgd"})
    result = run(wild)
    assert not result.has_passed
    assert result.reason.startswith(f"step {result.bad_step} was bad")


@pytest.mark.fault
def test_running_statistics_that_do_not_fit_are_told_from_not_learning() -> None:
    result = run(case("Aloof", steps=100))
    assert not result.has_passed
    assert "BatchNorm's running ones" in result.reason
    assert any("norm=group" in text for text in result.advice)
    own, eval_mode = result.last_with_batch_statistics["loss"], result.last["loss"]
    assert own is not None
    assert eval_mode is not None
    assert own < eval_mode / 10


@pytest.mark.fault
def test_the_command_ends_with_its_verdict(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "name: small\ntask: tests.diagnose.tasks:Sines\ntrial: {steps: 20}\n"
        "fixed: {learning_rate: 1e-2, batch_size: 4}\nsearch: {resources: {gpu: 0}}\n"
    )
    output = tmp_path / "out"
    words = ["diagnose", "--overfit", "--space", str(path), "--output", str(output)]
    assert main(words) == 0
    assert "overfit: passed" in capfd.readouterr().out
    assert json.loads((output / "overfit.json").read_text())["has_passed"] is True


@pytest.mark.parametrize(
    ("value", "is_met"), [(0.0, True), (1e-12, True), (0.01, False), (None, False)]
)
def test_an_error_rate_must_reach_0(value: float | None, *, is_met: bool) -> None:
    assert Goal(name="word_error_rate", limit=0.0, is_upper=True).is_met(value) is is_met


@pytest.mark.parametrize(("value", "is_met"), [(1.0, True), (0.99, False), (None, False)])
def test_an_accuracy_must_reach_1(value: float | None, *, is_met: bool) -> None:
    assert Goal(name="accuracy", limit=1.0, is_upper=False).is_met(value) is is_met
