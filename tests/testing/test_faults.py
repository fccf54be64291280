"""Every planted fault is seen by the engine as what it is, and leaves nothing behind."""

import math
import random
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_search.engine import GuardedEngine
from stability_search.errors import UsageError
from stability_search.records.step import StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.teacher import Teacher
from stability_search.testing import (
    BrokenLoss,
    BrokenModule,
    Fault,
    GradientOverflow,
    NanBatch,
    NanParameter,
    OutOfMemory,
    Raises,
    Sleep,
    plant,
    rehearse,
)
from tests.testing.sound_task import Deep

STEP = 3
PLACE: Mapping[str, Any] = {"step": STEP, "micro_batch": 1}
FP16: Mapping[str, Any] = {"precision": "fp16", "init_scale": 1024.0}


def settings_of(**engine: Any) -> EngineSettings:  # noqa: ANN401 - any setting
    return EngineSettings(**{"learning_rate": 0.01, **engine})


def records_of(*faults: Fault, num_steps: int = 5, **engine: Any) -> tuple[StepRecord, ...]:  # noqa: ANN401
    rehearsal = rehearse(
        Deep(), settings_of(**engine), *faults, num_steps=num_steps, accumulation_steps=2
    )
    return rehearsal.records


def labels_of(records: tuple[StepRecord, ...]) -> str:
    """Return the initials of the labels in order, such as `oobo`."""
    return "".join(record.label.value[0] for record in records)


@pytest.mark.parametrize("engine", [{}, FP16, {"precision": "bf16"}], ids=["fp32", "fp16", "bf16"])
def test_without_a_fault_every_step_is_ok(engine: Mapping[str, Any]) -> None:
    assert labels_of(records_of(**engine)) == "ooooo"


@pytest.mark.parametrize("engine", [{}, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("fault", "labels", "reason", "place", "is_transient"),
    [
        (NanBatch(**PLACE), "oodoo", "NaN in batch['inputs']", "forward", False),
        (
            NanBatch(**PLACE, value=math.inf, field="batch['targets']"),
            *("oodoo", "Inf in batch['targets']", "loss", False),
        ),
        (BrokenLoss(**PLACE), "ooboo", "loss", "loss", False),
        (BrokenLoss(**PLACE, value=math.nan), "ooboo", "loss", "loss", False),
        (BrokenLoss(**PLACE, is_transient=True), "ooboo", "loss", None, True),
        (
            BrokenLoss(**PLACE, breaks_reference=True),
            *("oodoo", "initial fp32 model", "loss", False),
        ),
        (BrokenModule(module="head", **PLACE), "ooboo", "", "forward", False),
        (BrokenModule(module="act", **PLACE, is_transient=True), "ooboo", "", None, True),
        (Raises(**PLACE, error=FloatingPointError("0/0")), "ooboo", "0/0", "loss", False),
        (
            Raises(**PLACE, error=FloatingPointError("0/0"), is_transient=True),
            *("ooboo", "0/0", None, True),
        ),
    ],
)
def test_a_fault_of_a_micro_batch_is_seen_as_what_it_is(  # noqa: PLR0913, PLR0917 - a table
    engine: Mapping[str, Any],
    fault: Fault,
    labels: str,
    reason: str,
    place: str | None,
    is_transient: bool,
) -> None:
    records = records_of(fault, **engine)
    broken = records[STEP - 1]
    assert labels_of(records) == labels
    assert reason in broken.reason
    assert broken.batch_index == (STEP - 1) * 2 + 1
    assert broken.first_nonfinite_phase == place
    assert broken.is_transient is is_transient
    assert broken.is_applied  # the window went on with its other micro-batch
    assert [record.scale for record in records] == [engine.get("init_scale")] * 5


@pytest.mark.parametrize("name", ["encoder", "act", "head"])
def test_the_module_that_emits_nan_is_named(name: str) -> None:
    for is_transient, expected in ((False, name), (True, None)):
        fault = BrokenModule(module=name, step=STEP, value=math.nan, is_transient=is_transient)
        broken = records_of(fault)[STEP - 1]
        assert (broken.label, broken.first_nonfinite_module) == ("bad", expected)


def test_an_infinity_that_a_tanh_swallows_is_no_fault() -> None:
    assert labels_of(records_of(BrokenModule(module="encoder", step=STEP))) == "ooooo"


@pytest.mark.parametrize("name", ["encoder", "act", "head"])
def test_the_module_whose_gradient_overflows_is_named(name: str) -> None:
    records = records_of(GradientOverflow(module=name, **PLACE))
    assert labels_of(records) == "ooboo"
    broken = records[STEP - 1]
    assert (broken.first_nonfinite_phase, broken.first_nonfinite_module) == ("backward", name)
    assert broken.is_loss_finite
    assert not broken.is_applied


def test_an_overflow_of_the_loss_s_gradient_may_be_transient() -> None:
    for is_transient, phase in ((False, "loss"), (True, "backward")):
        fault = GradientOverflow(step=STEP, is_transient=is_transient)
        broken = records_of(fault)[STEP - 1]
        assert (broken.label, broken.is_loss_finite, broken.is_applied) == ("bad", True, False)
        assert (broken.first_nonfinite_phase, broken.first_nonfinite_module) == (phase, None)
        assert broken.is_transient is is_transient


def test_an_overflow_above_a_scale_is_calibration_until_the_scale_is_below() -> None:
    fault = GradientOverflow(above_scale=1024.0)
    records = records_of(fault, precision="fp16", init_scale=4096.0)
    assert labels_of(records) == "ccooo"
    assert [record.scale for record in records] == [4096, 2048, 1024, 1024, 1024]
    assert labels_of(records_of(precision="fp16", init_scale=4096.0)) == "ooooo"


def test_without_loss_scaling_the_scale_is_one() -> None:
    assert labels_of(records_of(GradientOverflow(above_scale=1.0))) == "ooooo"
    assert labels_of(records_of(GradientOverflow(above_scale=0.5))) == "bbbbb"


def test_an_overflow_at_a_proven_scale_is_bad_and_halves_it() -> None:
    records = records_of(GradientOverflow(step=25), num_steps=26, **FP16)
    assert labels_of(records) == "o" * 24 + "bo"
    assert "known to work" in records[24].reason
    assert records[25].scale == 512


def test_an_overflow_at_every_scale_ends_in_a_collapse() -> None:
    engine = settings_of(precision="fp16", init_scale=4.0)
    rehearsal = rehearse(Deep(), engine, GradientOverflow())
    assert rehearsal.ended is not None
    assert rehearsal.ended[0] is Outcome.SCALE_COLLAPSE
    assert len(rehearsal.records) == 3
    assert rehearse(Deep(), engine).ended is None


def test_a_parameter_that_becomes_nan_ends_training() -> None:
    rehearsal = rehearse(Deep(), settings_of(), NanParameter(parameter="head.bias", step=STEP))
    assert rehearsal.ended is not None
    assert rehearsal.ended[0] is Outcome.NONFINITE_PARAMETERS
    assert labels_of(rehearsal.records) == "oob"


def test_running_out_of_memory_is_an_outcome() -> None:
    rehearsal = rehearse(Deep(), settings_of(), OutOfMemory(step=STEP))
    assert rehearsal.ended == (
        Outcome.OUT_OF_MEMORY,
        "OutOfMemoryError: out of memory (planted)",
    )
    assert labels_of(rehearsal.records) == "oo"


def test_another_error_of_the_task_passes_through() -> None:
    with pytest.raises(KeyError, match="frames"):
        records_of(Raises(step=STEP, error=KeyError("frames")))


def test_a_sleep_happens_once_a_step_and_changes_nothing() -> None:
    slept: list[float] = []
    sleep = Sleep(step=STEP, seconds=2.5, sleep=slept.append)
    broken = BrokenLoss(step=STEP)  # the micro-batch is repeated, the sleep is not
    assert labels_of(records_of(sleep)) == "ooooo"
    assert slept == [2.5]
    assert labels_of(records_of(sleep, broken)) == "ooboo"
    assert slept == [2.5, 2.5]


@pytest.mark.parametrize("steps", [range(2, 6, 3), frozenset({2, 5}), [5, 2]])
def test_a_fault_may_come_at_several_steps(steps: Any) -> None:  # noqa: ANN401 - any collection
    assert labels_of(records_of(NanBatch(step=steps), num_steps=6)) == "odoodo"


def test_several_faults_may_meet_in_one_step() -> None:
    both = records_of(NanBatch(step=STEP), BrokenLoss(step=STEP, micro_batch=1))[STEP - 1]
    assert both.label == "data"
    assert not both.is_applied  # no micro-batch was left


def test_named_terms_of_a_loss_are_broken_too() -> None:
    class Named(Deep):
        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"fit": super().loss(model, batch), "rest": torch.tensor(0.0)}  # type: ignore[dict-item]

    broken, overflown = rehearse(
        Named(), settings_of(), BrokenLoss(step=1), GradientOverflow(step=2), num_steps=2
    ).records
    assert broken.loss_terms == {"fit": None, "rest": 0.0}
    assert (overflown.label, overflown.is_loss_finite) == ("bad", True)


# -- on a loop of one's own --------------------------------------------------------------------


def step_once(model: nn.Module, *faults: Fault, window: list[Any] | None = None) -> StepRecord:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = model(batch)
        return output.square().mean()

    planted = plant(*faults)
    window = [torch.ones(4, 3)] if window is None else window
    with GuardedEngine(model, settings_of()) as engine:
        return engine.step(*planted.before_step(engine.num_steps + 1, engine, window, loss_fn))


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())  # noqa: SLF001


def test_hooks_are_gone_after_the_step_and_after_an_exception() -> None:
    model = Deep().model()
    assert step_once(model, BrokenModule(module="act", step=1)).label == "bad"
    assert hooks_of(model) == 0
    with pytest.raises(KeyError, match="frames"):
        step_once(
            model,
            Raises(step=1, error=KeyError("frames")),
            GradientOverflow(module="head", step=1),
        )
    assert hooks_of(model) == 0
    assert step_once(model, NanBatch(step=2)).label == "ok"


def test_the_batch_itself_is_left_as_it_is() -> None:
    window = [torch.ones(4, 3)]
    assert step_once(Deep().model(), NanBatch(step=1), window=window).label == "data"
    assert torch.equal(window[0], torch.ones(4, 3))


def test_an_idle_module_that_returns_its_input_does_not_spoil_the_batch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(3, 1))
    record = step_once(model, BrokenModule(module="1", step=1))
    assert (record.label, record.first_nonfinite_module) == ("bad", "1")


def test_only_what_goes_through_the_module_gets_its_broken_gradient() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.path = nn.Identity()
            self.act = nn.ReLU(inplace=True)

        def forward(self, inputs: Tensor) -> Tensor:
            inner = self.inner(inputs)
            return self.act(self.path(inner)) + inner  # type: ignore[no-any-return]

    record = step_once(Shortcut(), GradientOverflow(module="path"))
    assert (record.label, record.first_nonfinite_module) == ("bad", "path")
    assert step_once(Shortcut(), GradientOverflow(module="path", step=2)).label == "ok"


def test_a_module_may_return_any_nest() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.LSTM(3, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.recurrent(inputs)[0].sum(-1)  # type: ignore[no-any-return]

    record = step_once(Two(), BrokenModule(module="recurrent", step=1))
    assert (record.label, record.first_nonfinite_module) == ("bad", "recurrent")
    assert step_once(Two(), BrokenModule(module="recurrent", step=2)).label == "ok"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            BrokenModule(module="encodr", step=9),
            (
                "BrokenModule: module must name a module of the model, but got 'encodr'. "
                "Did you mean `encoder`?"
            ),
        ),
        (
            GradientOverflow(module="xyz"),
            (
                "GradientOverflow: module must name a module of the model, but got 'xyz'. "
                "There are `encoder`, `act`, `head`."
            ),
        ),
        (
            NanParameter(parameter="head.weigt", step=9),
            (
                "NanParameter: parameter must name a parameter of the model, but got "
                "'head.weigt'. Did you mean `head.weight`?"
            ),
        ),
        (
            NanBatch(step=1, field="batch[1]"),
            (
                "NanBatch: field must name a tensor of floating point, but got 'batch[1]'. "
                "Did you mean `batch`?"
            ),
        ),
        (
            NanBatch(step=1, micro_batch=1),
            (
                "NanBatch: micro_batch must be a position in the window of 1, but got 1. "
                "Positions count from 0."
            ),
        ),
    ],
)
def test_what_is_not_there_is_refused_before_the_first_step(fault: Fault, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        step_once(Deep().model(), fault)
    assert str(caught.value) == message


def test_a_batch_without_floating_point_cannot_be_nan() -> None:
    with pytest.raises(UsageError, match="NanBatch: a tensor of floating point must be there"):
        step_once(Deep().model(), NanBatch(step=1), window=[torch.ones(4, 3, dtype=torch.long)])


def test_a_module_that_is_never_called_is_refused() -> None:
    class Idle(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.idle = nn.Linear(3, 1)

    with pytest.raises(UsageError, match="module must be called in a forward pass, but `idle`"):
        step_once(Idle(), BrokenModule(module="idle", step=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NanBatch(step=0), "NanBatch: step must be >= 1, but got 0"),
        (lambda: NanBatch(step=range(5, 0, -5)), "ok"),
        (lambda: NanBatch(step=range(5, -1, -5)), "step must be >= 1, but got range"),
        (lambda: NanParameter(parameter="x", step=[]), "NanParameter: step must hold at least"),
        (lambda: BrokenLoss(step=1, micro_batch=-1), "BrokenLoss: micro_batch must be >= 0"),
        (lambda: BrokenLoss(step=1, value=1e30), "BrokenLoss: value must be NaN or an infinity"),
        (lambda: GradientOverflow(above_scale=math.nan), "above_scale must be a finite number"),
        (lambda: Sleep(step=1, seconds=0), "Sleep: seconds must be a finite number > 0"),
        (plant, "plant: at least one fault must be given"),
    ],
)
def test_a_fault_that_could_never_act_is_refused(make: Any, message: str) -> None:  # noqa: ANN401
    if message == "ok":
        assert make().step[0] == 5
        return
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fault_cannot_be_changed() -> None:
    fault = NanBatch(step=1)
    with pytest.raises(FrozenInstanceError, match="step"):
        fault.step = 2  # type: ignore[misc]


# -- on the built-in teacher -------------------------------------------------------------------


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_teacher_is_broken_where_the_fault_says(gradient_checkpointing: bool) -> None:
    engine = settings_of(**FP16, gradient_checkpointing=gradient_checkpointing)
    names = [name for name, module in Teacher().model().named_modules() if name and "norm" in name]
    name = random.Random(0).choice(names)  # noqa: S311 - any of them
    faults = (NanBatch(step=2), BrokenModule(module=name, step=3))
    records = rehearse(Teacher(), engine, *faults, num_steps=4).records
    assert labels_of(records) == "odbo"
    assert records[2].first_nonfinite_module == name
    assert labels_of(rehearse(Teacher(), engine, num_steps=4).records) == "oooo"
