"""An engine that goes on from a saved state, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient, loss_fn, net, same, train, windows


def settings(**more: Any) -> EngineSettings:
    chosen = {"learning_rate": 0.01, "clip_norm": 1.0, "num_planned_steps": 30}
    return EngineSettings(**{**chosen, "schedule": "cosine", "warmup_steps": 4, **more})


def without_time(record: StepRecord) -> dict[str, Any]:
    return {name: value for name, value in record.to_json().items() if name != "step_s"}


@pytest.mark.parametrize("stop", [1, 3, 15])
@pytest.mark.parametrize(
    "more",
    [
        {"precision": "fp32"},
        {"precision": "fp32", "optimizer": "sgd", "momentum": 0.9},
        {"precision": "bf16", "init_gain": 0.5},
        {"precision": "fp16", "init_scale": 2.0**30, "growth_interval": 8},
        {"precision": "fp16", "init_scale": 2.0**30, "fp16_on_cpu": "native"},
    ],
)
def test_it_goes_on_bit_for_bit_even_in_the_middle_of_calibration(
    more: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    data = windows(30, accumulation=2)
    torch.manual_seed(5)
    with GuardedEngine(net(), settings(**more)) as engine:
        records = train(engine, data)
        final = engine.state_dict()

    torch.manual_seed(5)
    with GuardedEngine(net(), settings(**more)) as engine:
        before = train(engine, data[:stop])
        torch.save(engine.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(999)
    with GuardedEngine(net(seed=3), settings(**more)) as engine:
        engine.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        after = train(engine, data[stop:])
        assert same(engine.state_dict(), final)

    assert [*map(without_time, before), *map(without_time, after)] == [*map(without_time, records)]
    if more["precision"] == "fp16" and stop <= 3:
        assert before[-1].label is after[0].label is StepLabel.CALIBRATION


def test_what_the_first_batch_held_is_remembered() -> None:
    mask = torch.tensor([[0.0, -torch.inf]])

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (
            torch.softmax(model(batch["x"])[:, :2] + batch["mask"], -1).sum() / batch["by"].sum()
        )

    def batch(by: float, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": torch.ones(1, 2), "mask": mask, "by": torch.tensor([by]), **more}

    first = GuardedEngine(torch.nn.Linear(2, 2), settings())
    with first:
        first.step([batch(1.0)], loss)
        state = first.state_dict()
    with GuardedEngine(torch.nn.Linear(2, 2), settings()) as engine:
        engine.load_state_dict(state)
        record = engine.step([batch(0.0, x=torch.full((1, 2), -torch.inf))], loss)
        assert engine.step([batch(0.0)], loss).label is StepLabel.BAD
    assert (record.label, record.reason) == (StepLabel.DATA, "-Inf in batch['x']")


def test_the_scale_known_to_work_is_remembered() -> None:
    def broken(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return BreakGradient.apply(loss_fn(model, batch))

    chosen = settings(precision="fp16", init_scale=16.0)
    with GuardedEngine(net(), chosen) as engine:
        train(engine, windows(20))
        state = engine.state_dict()
    with GuardedEngine(net(), chosen) as engine:
        engine.load_state_dict(state)
        assert engine.step(windows(1)[0], broken).label is StepLabel.BAD


def test_an_end_is_remembered_and_an_earlier_state_is_the_way_back() -> None:
    data = windows(2)
    with GuardedEngine(net(), settings()) as engine:
        engine.step(data[0], loss_fn)
        early = torch.utils._pytree.tree_map(  # noqa: SLF001 - a copy of a nest of tensors
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, engine.state_dict()
        )
        with torch.no_grad():
            next(engine.model.parameters()).fill_(torch.nan)
        engine.step(data[1], loss_fn)
        late = engine.state_dict()
        assert engine.ended is not None
        assert engine.ended[0] is Outcome.NONFINITE_PARAMETERS
        end = engine.ended

        engine.load_state_dict(early)
        assert engine.ended is None
        assert engine.step(data[1], loss_fn).label is StepLabel.OK
    with GuardedEngine(net(), settings()) as other:
        other.load_state_dict(late)
        assert other.ended == end


def test_a_state_of_another_precision_is_refused() -> None:
    with (
        GuardedEngine(net(), settings()) as plain,
        GuardedEngine(net(), settings(precision="fp16")) as scaled,
    ):
        for engine, state in ((plain, scaled.state_dict()), (scaled, plain.state_dict())):
            with pytest.raises(ValueError, match="must come from an engine of the same precision"):
                engine.load_state_dict(state)
