"""The same promises on a GPU: one transfer a step, plain PyTorch's numbers, its random state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from stability_search.trial import run_trial
from tests.engine.plain import DTYPES, loss_fn, net, same, windows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRECISIONS = ["fp32", "bf16", "fp16"]


def on_gpu(data: list[list[Any]]) -> list[list[Any]]:
    return [[tuple(part.cuda() for part in batch) for batch in window] for window in data]


def settings(**more: Any) -> EngineSettings:
    return EngineSettings(
        **{"learning_rate": 0.01, "clip_norm": 0.5, "init_scale": 1024.0, **more}
    )


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_ok_step_copies_to_the_host_once(precision: str, accumulation: int) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda()
    window = [torch.randn(4, 5, 8, device="cuda") for _ in range(accumulation)]

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).float().square().mean()

    with GuardedEngine(model, settings(precision=precision, attention_clamp=5.0)) as engine:
        for _ in range(3):
            engine.step(window, loss)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            record = engine.step(window, loss)
            torch.cuda.synchronize()
    copies = [event.name for event in profile.events() if "Memcpy DtoH" in event.name]
    assert record.label is StepLabel.OK
    assert len(copies) == 1, copies


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_trains_as_plain_pytorch_does_bit_for_bit(precision: str) -> None:
    data = on_gpu(windows(100, accumulation=2))
    chosen = settings(precision=precision)
    plain, guarded = net().cuda(), net().cuda()
    optimizer = torch.optim.AdamW(plain.parameters(), chosen.learning_rate, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, enabled=precision == "fp16")
    torch.manual_seed(7)
    for window in data:
        optimizer.zero_grad()
        for batch in window:
            dtype = DTYPES.get(precision, torch.bfloat16)
            with torch.autocast("cuda", dtype=dtype, enabled=precision != "fp32"):
                loss = loss_fn(plain, batch)
            scaler.scale(loss / len(window)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(plain.parameters(), chosen.clip_norm or 1.0)
        scaler.step(optimizer)
        scaler.update()
    after = torch.cuda.get_rng_state()

    torch.manual_seed(7)
    with GuardedEngine(guarded, chosen) as engine:
        records = [engine.step(window, loss_fn) for window in data]

    assert {record.label for record in records} == {StepLabel.OK}
    assert same(plain.state_dict(), guarded.state_dict())
    assert torch.equal(torch.cuda.get_rng_state(), after)


def test_a_skipped_micro_batch_leaves_the_gpus_random_state_as_if_it_had_not_been() -> None:
    good, bad = on_gpu(windows(2))
    bad = [(bad[0][0] * torch.nan, bad[0][1])]
    with_fault, without = net(dropout=0.5).cuda(), net(dropout=0.5).cuda()
    torch.manual_seed(1)
    with GuardedEngine(with_fault, settings()) as engine:
        assert engine.step([*good, *bad], loss_fn).label is StepLabel.DATA
        first = torch.cuda.get_rng_state()
    torch.manual_seed(1)
    with GuardedEngine(without, settings()) as engine:
        engine.step(good, loss_fn)
        assert torch.equal(torch.cuda.get_rng_state(), first)
    assert same(with_fault.state_dict(), without.state_dict())


def test_a_trial_on_a_gpu_says_so() -> None:
    tiny = Path(__file__).parents[1] / "tiny_task.py"
    config = TrialConfig(
        task=TaskReference(file=str(tiny), class_name="Tiny"),
        engine=settings(num_planned_steps=20, precision="fp16"),
        num_planned_steps=20,
        device="cuda",
    )
    running = run_trial(config, constants=TrialConstants(probe_steps=(0, 20)))
    try:
        while True:
            next(running)
    except StopIteration as end:
        summary = end.value
    assert (summary.outcome, summary.fp16_kind) == (Outcome.COMPLETED, "cuda")
    assert summary.device == torch.cuda.get_device_name()
    assert summary.peak_memory_mib > 0
