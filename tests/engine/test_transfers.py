"""An `ok` step costs one transfer from device to host."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel
from stability_search.settings.engine import EngineSettings

pytestmark = pytest.mark.fault  # whole steps under the profiler

READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}


class Counted:
    """Count what brings a number to the host: `tolist`, and reads that the profiler sees.

    A fused optimizer on the CPU reads its own step count once a parameter; those are left out.
    """

    def __init__(self) -> None:
        self.num_lists = 0
        self.num_reads = 0

    def run(self, step: Any) -> Any:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = step()
        events = profile.events()
        optimizers = [e.time_range for e in events if e.name.startswith("Optimizer.step")]
        assert optimizers
        self.num_reads = sum(
            1
            for event in events
            if event.name in READS
            and not any(o.start <= event.time_range.start <= o.end for o in optimizers)
            and (event.cpu_parent is None or event.cpu_parent.name not in READS)
        )
        return result


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted()
    to_list = torch.Tensor.tolist

    def counting(tensor: torch.Tensor) -> Any:
        found.num_lists += 1
        return to_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counting)
    return found


def loss(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    y = model(x).float()
    return {"size": y.square().mean(), "drift": y.mean().square()}


def engine(**more: Any) -> GuardedEngine:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    return GuardedEngine(
        model,
        EngineSettings(
            **{
                "learning_rate": 0.01,
                "init_scale": 128.0,
                "clip_norm": 1.0,
                "attention_clamp": 5.0,
                "attention_logit_cap": 5.0,
                **more,
            }
        ),
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "more",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp16", "gradient_checkpointing": True},
        {"precision": "fp32", "optimizer": "sgd", "momentum": 0.9, "clip_norm": None},
    ],
)
def test_an_ok_step_reads_once(more: dict[str, Any], accumulation: int, counted: Counted) -> None:
    window = [torch.randn(4, 5, 8) for _ in range(accumulation)]
    with engine(**more) as guarded:
        guarded.step(window, loss)
        for step in (2, 3, 4):  # more is looked at in the fourth
            if step == 3:
                guarded.step(window, loss)
                continue
            counted.num_lists = 0
            record = counted.run(lambda: guarded.step(window, loss))
            assert (record.step, record.label) == (step, StepLabel.OK)
            assert (counted.num_lists, counted.num_reads) == (1, 0)
            assert (record.zero_grad_frac is not None) == (step == 4)
    assert record.attention_max is not None
    assert record.clamp_frac is not None


def test_a_loss_that_reads_would_be_counted(counted: Counted) -> None:
    """The twin: the count sees a read that is there."""

    def reading(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        value = loss(model, x)["size"]
        return value if bool(torch.isfinite(value)) else value * 0

    window = [torch.randn(4, 5, 8) for _ in range(3)]
    with engine() as guarded:
        guarded.step(window, reading)
        counted.num_lists = 0
        counted.run(lambda: guarded.step(window, reading))
    assert (counted.num_lists, counted.num_reads) == (1, 3)
