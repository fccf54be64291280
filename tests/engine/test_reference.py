"""Bad data, told from a bad configuration."""

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.engine.observer import Observer
from stability_search.engine.reference import DataJudge
from stability_search.records.step import StepLabel
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient

CPU = torch.device("cpu")
BLANK = 0


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.01, **more})


def linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4)
    with torch.no_grad():
        layer.weight[0] = 1.0  # so that a sum of three can overflow
    return layer


def ctc_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    frames, target = batch
    log_probs = model(frames).float().log_softmax(-1)
    lengths = (frames.size(0),), (target.numel(),)
    return F.ctc_loss(log_probs, target, *lengths, blank=BLANK)


def ctc(num_frames: int, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(num_frames, 1, 3), torch.tensor([labels])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("num_frames", "labels"),
    [(5, [1, 2, 3, 1, 2, 3, 1, 2]), (4, [1, 1, 1])],  # a repeat needs a blank between
)
def test_a_ctc_target_that_does_not_fit_is_the_datas_fault(
    num_frames: int, labels: list[int], precision: str
) -> None:
    with GuardedEngine(linear(), settings(precision=precision), reference=linear) as engine:
        fine = engine.step([ctc(6, [1, 2, 3])], ctc_loss)
        record = engine.step([ctc(num_frames, labels)], ctc_loss)
    assert fine.label is StepLabel.OK
    assert record.label is StepLabel.DATA
    assert record.reason == "the initial fp32 model gives a non-finite loss on it too"
    assert (record.batch_index, record.is_loss_finite, record.is_applied) == (1, False, False)


def test_without_a_reference_the_same_batch_is_a_bad_step() -> None:
    """The twin: it is the reference that tells the two apart."""
    with GuardedEngine(linear(), settings()) as engine:
        record = engine.step([ctc(4, [1, 1, 1])], ctc_loss)
    assert (record.label, record.reason) == (StepLabel.BAD, "loss is Inf")


def test_what_only_a_trained_model_cannot_bear_is_bad() -> None:
    model = linear()
    with torch.no_grad():
        model.weight.fill_(1e30)
    with GuardedEngine(model, settings(), reference=linear) as engine:
        record = engine.step([torch.ones(2, 3)], lambda m, x: m(x).square().square().mean())
    assert record.label is StepLabel.BAD


def test_what_only_half_precision_cannot_bear_is_bad() -> None:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).float().abs().mean()

    with GuardedEngine(linear(), settings(precision="fp16"), reference=linear) as engine:
        record = engine.step([torch.full((2, 3), 1e6)], loss)
    assert record.label is StepLabel.BAD
    assert record.first_nonfinite_module == "Linear"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("has_reference", [False, True])
def test_nan_and_infinity_in_a_batch_need_no_reference(value: float, has_reference: bool) -> None:
    def build() -> nn.Module:
        raise AssertionError("asked though the batch itself was broken")

    good, broken = {"x": torch.ones(2, 3)}, {"x": torch.tensor([[1.0, value, 1.0]])}

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(batch["x"]).square().mean()

    reference = build if has_reference else None
    with GuardedEngine(linear(), settings(bad_microbatch="drop"), reference=reference) as engine:
        engine.step([good, good], loss)
        record = engine.step([good, broken], loss)
    assert record.label is StepLabel.DATA
    assert record.reason.endswith("in batch['x']")
    assert record.batch_index == 3


def test_an_additive_mask_is_full_of_minus_infinity_and_no_fault() -> None:
    mask = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf)

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(batch["x"])[:, :3] + batch["mask"]
        return F.softmax(logits, -1).square().mean()

    x = torch.ones(3, 3)
    with GuardedEngine(linear(), settings(), reference=linear) as engine:
        ok = engine.step([{"x": x, "mask": mask}], loss)
        broken = engine.step([{"x": x, "mask": mask}], lambda m, b: loss(m, b) * math.nan)
        wrong = engine.step([{"x": -x / 0, "mask": mask}], loss)
    assert ok.label is StepLabel.OK
    assert broken.reason == "the initial fp32 model gives a non-finite loss on it too"
    assert (wrong.label, wrong.reason) == (StepLabel.DATA, "-Inf in batch['x']")


def test_data_comes_before_bad_gradients_too() -> None:
    """Finite loss, non-finite gradient: sqrt at zero, which a broken batch can hide behind."""

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (model(batch["x"]) * 0).sqrt().sum() + batch["note"].nan_to_num().sum() * 0

    good = {"x": torch.ones(1, 3), "note": torch.ones(1)}
    noted = {"x": torch.ones(1, 3), "note": torch.tensor([math.nan])}
    with GuardedEngine(linear(), settings()) as engine:
        bad = engine.step([good], loss)
        data = engine.step([noted], loss)
    assert (bad.label, bad.reason) == (StepLabel.BAD, "gradient is NaN or Inf")
    assert bad.first_nonfinite_phase == "loss"
    assert (data.label, data.reason) == (StepLabel.DATA, "NaN in batch['note']")


# -- the reference itself --------------------------------------------------------------------


def judge(reference: Any, observer: Observer | None = None) -> DataJudge:
    made = DataJudge(reference, CPU, contextlib.nullcontext, observer or Observer())
    made.see(torch.zeros(1))
    return made


def test_it_is_built_once_and_asked_once_per_micro_batch() -> None:
    built, asked = [], []

    def build() -> nn.Module:
        built.append(1)
        return linear()

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        asked.append(1)
        return model(x).mean()

    found = judge(build)
    assert built == []
    for _ in range(2):
        assert found.fault([torch.ones(1, 3)] * 3, loss) == (None, "")
    assert (len(built), len(asked)) == (1, 6)


def test_it_is_asked_only_of_a_non_finite_step() -> None:
    def build() -> nn.Module:
        raise AssertionError("asked of a finite step")

    with GuardedEngine(linear(), settings(), reference=build) as engine:
        assert engine.step([torch.ones(1, 3)], lambda m, x: m(x).mean()).label is StepLabel.OK


def test_it_stays_the_initial_model_in_fp32_and_leaves_no_trace() -> None:
    made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).half()
    losses = []

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        losses.append((y.dtype, y.abs().sum().item(), torch.is_grad_enabled()))
        return y.mean() * x.mean()

    found = judge(lambda: made)
    state = torch.get_rng_state()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        assert found.fault([x], loss) == (None, "")
    assert losses == [losses[0]] * 2
    assert (losses[0][0], losses[0][2]) == (torch.float32, True)
    assert made[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_what_it_cannot_compute_for_numerical_reasons_is_a_fault() -> None:
    def singular(_model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x @ x.T * 0).mean()

    position, fault = judge(linear).fault([torch.ones(2, 3)], singular)
    assert position == 0
    assert fault.startswith("the initial fp32 model fails on it too (LinAlgError: linalg.inv")


def test_so_is_what_the_task_raises_because_the_reference_broke_on_it() -> None:
    def refuses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        if not torch.isfinite(y).all():
            raise ValueError("not finite")
        return y.mean()

    largest = torch.full((1, 3), 3.4e38)  # finite itself
    assert judge(linear).fault([torch.ones(1, 3), largest * 1.0], refuses) == (
        1,
        "the initial fp32 model fails on it too (ValueError: not finite)",
    )


def test_what_the_reference_cannot_bear_for_another_reason_is_no_verdict() -> None:
    """A model of other norms may refuse a batch of one; it says nothing about the batch."""

    def wrong(_model: nn.Module, _x: torch.Tensor) -> torch.Tensor:
        raise KeyError("frames")

    observer = Observer()
    found = judge(linear, observer)
    assert found.fault([torch.ones(1, 3)] * 2, wrong) == (None, "")
    assert observer.notes == [
        "The batch at a bad step is not fully observed (KeyError: 'frames')."
    ]


def test_a_reference_with_batch_norm_and_a_batch_of_one_ends_no_training() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Flatten(), nn.Linear(16, 1))

    chosen = settings(norm="group", precision="fp16")
    with GuardedEngine(build(), chosen, reference=build) as engine:
        x = torch.ones(1, 3)
        record = engine.step([x], lambda m, x: BreakGradient.apply(m(x).float().sum()))
        assert (record.label, engine.scale) == (StepLabel.CALIBRATION, 32768.0)
        assert engine.step([x], lambda m, x: m(x).float().sum()).label is StepLabel.OK
        assert "not fully observed (ValueError: Expected more than 1 value" in engine.notes[-1]


def test_a_loss_that_takes_gradients_of_its_own_can_be_judged() -> None:
    def penalty(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return model(x).mean() + (slope.norm() - 1).square()

    observer = Observer()
    found = judge(linear, observer)
    assert found.fault([torch.ones(1, 3)], penalty) == (None, "")
    assert observer.notes == []


def test_without_memory_for_the_reference_training_goes_on() -> None:
    num_built = 0

    def build() -> nn.Module:
        nonlocal num_built
        num_built += 1
        raise torch.OutOfMemoryError("no memory for a second model")

    with GuardedEngine(linear(), settings(), reference=build) as engine:
        record = engine.step([torch.ones(1, 3)], lambda m, x: m(x).mean() * math.nan)
    assert (record.label, num_built) == (StepLabel.BAD, 1)
    assert "no memory for a second model" in engine.notes[-1]


def test_it_runs_in_train_mode_however_it_was_built() -> None:
    modes = []

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        modes.append(model.training)
        return model(x).mean()

    judge(lambda: linear().eval()).fault([torch.ones(1, 3)], loss)
    assert modes == [True]
