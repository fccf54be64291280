"""Adapters stored in fp16 cannot be unscaled by torch's scaler; the engine gives them fp32.

A model is fine-tuned with LoRA (rank 64, adapters in fp16 like the frozen base) under fp16
autocast, with gradient checkpointing, accumulation 8 and clipping. "Attempting to unscale FP16
gradients" is raised whether blocks are checkpointed or not: it comes from the fp16 adapters.
"""

import copy
import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn
from torch.utils.checkpoint import checkpoint

from stability_search.engine import GuardedEngine
from stability_search.records import StepLabel, StepRecord
from stability_search.settings import EngineSettings
from tests.engine.plain import same

pytestmark = pytest.mark.fault  # whole trainings

RANK, ACCUMULATION, WIDTH, BLOCKS = 64, 8, 16, 2
RATE = 2e-5  # the team's
CLIP_NORM, SCALE = 0.5, 1024.0  # so that clipping acts on a small model

Batch = tuple[torch.Tensor, torch.Tensor]


class Adapted(nn.Module):
    """A frozen linear layer with a trainable low-rank update, which starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.up(self.down(x))
        return self.base(x) + update  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual feed-forward block of adapted layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Adapted(nn.Linear(WIDTH, 2 * WIDTH))
        self.narrow = Adapted(nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(F.gelu(self.wide(x)))  # type: ignore[no-any-return]


class Speech(nn.Module):
    """Blocks in a list, recomputed in the backward pass on demand."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.is_checkpointed = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointed else block(x)
        return x


def speech(adapters: torch.dtype = torch.float16, *, is_checkpointed: bool = True) -> Speech:
    model = Speech().half()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapters)
    model.is_checkpointed = is_checkpointed
    return model


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(model(x).float(), y)


def windows(count: int) -> list[list[Batch]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        xs = torch.randn(ACCUMULATION, 8, WIDTH, generator=generator)
        made.append([(x, x.roll(1, dims=1)) for x in xs])
    return made


# -- the team's loop -------------------------------------------------------------------------


def train_as_the_team(model: nn.Module, *, is_fused: bool, clips: bool) -> float:
    """Train two windows with torch's scaler; return the largest change of a parameter."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=is_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    for window in windows(2):
        for batch in window:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_fn(model, batch)
            scaler.scale(loss / ACCUMULATION).backward()
        if clips:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return max((p - q).abs().max().item() for p, q in zip(trained, before, strict=True))


CASES = pytest.mark.parametrize(
    ("is_fused", "clips", "raises"),
    [(False, False, True), (False, True, True), (True, True, True), (True, False, False)],
    ids=["plain", "plain and clipped", "fused and clipped", "fused"],
)


@CASES
@pytest.mark.parametrize("is_checkpointed", [True, False], ids=["checkpointed", "kept"])
def test_three_of_four_loops_crash_with_and_without_checkpointing(
    *, is_checkpointed: bool, is_fused: bool, clips: bool, raises: bool
) -> None:
    model = speech(is_checkpointed=is_checkpointed)
    if raises:
        with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
            train_as_the_team(model, is_fused=is_fused, clips=clips)
    else:
        train_as_the_team(model, is_fused=is_fused, clips=clips)


def test_the_loop_that_does_not_crash_trains_pure_fp16() -> None:
    """Adam's eps of 1e-8 and small second moments are 0 in fp16, so updates dwarf the rate."""
    half, single = speech(), speech(torch.float32)
    change = train_as_the_team(half, is_fused=True, clips=False)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    assert change > 100 * (2 * RATE)
    assert train_as_the_team(single, is_fused=True, clips=False) < 1.1 * (2 * RATE)


@CASES
@pytest.mark.parametrize("is_checkpointed", [True, False], ids=["checkpointed", "kept"])
def test_no_loop_crashes_with_fp32_adapters(
    *, is_checkpointed: bool, is_fused: bool, clips: bool, raises: bool
) -> None:
    """The twin: what is stored in fp16 is the cause."""
    del raises
    model = speech(torch.float32, is_checkpointed=is_checkpointed)
    assert 0 < train_as_the_team(model, is_fused=is_fused, clips=clips) < 1.1 * (2 * RATE)


# -- the engine ------------------------------------------------------------------------------


def train_guarded(
    model: nn.Module, num_steps: int, **more: object
) -> tuple[list[StepRecord], tuple[str, ...]]:
    chosen = {"learning_rate": RATE, "precision": "fp16", "init_scale": SCALE}
    settings = EngineSettings(**{**chosen, "clip_norm": CLIP_NORM, **more})
    with GuardedEngine(model, settings) as engine:
        records = [engine.step(window, loss_fn) for window in windows(num_steps)]
        return records, engine.notes


ENGINES = pytest.mark.parametrize(
    "more",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "fp16_on_cpu": "native"},
        {"gradient_checkpointing": True, "clip_norm": None},
    ],
    ids=["kept", "checkpointed", "native", "not clipped"],
)


@ENGINES
def test_the_engine_trains_the_adapters_in_fp32_and_leaves_the_rest_in_fp16(
    more: dict[str, object],
) -> None:
    model = speech(is_checkpointed=False)
    before = copy.deepcopy(model)
    records, _ = train_guarded(model, 4, **more)

    assert [record.label for record in records] == [StepLabel.OK] * 4
    assert all(record.clipped is (more.get("clip_norm", 1) is not None) for record in records)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if new.requires_grad:
            assert new.dtype == torch.float32, name
            assert 0 < (new - old).abs().max().item() < 4.2 * RATE, name
        else:
            assert new.dtype == torch.float16, name
            assert torch.equal(new, old), name


def test_checkpointing_changes_no_bit() -> None:
    kept, recomputed = speech(is_checkpointed=False), speech(is_checkpointed=False)
    train_guarded(kept, 4)
    train_guarded(recomputed, 4, gradient_checkpointing=True)
    assert same(kept.state_dict(), recomputed.state_dict())


def test_what_was_done_is_said_once_with_its_memory() -> None:
    model = speech()
    num_values = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _, notes = train_guarded(model, 2)
    (note,) = [note for note in notes if "master weights" in note]
    assert "trainable parameters were stored in float16; they are kept as fp32 master" in note
    mib = re.search(r"([\d.]+) MiB more", note)
    assert mib is not None
    assert float(mib.group(1)) == pytest.approx(num_values * 2 / 2**20, abs=0.05)
    assert not any("were stored" in other for other in notes if other is not note)

    _, notes = train_guarded(speech(torch.float32), 1)
    assert not any("master weights" in note for note in notes)


def test_fp32_and_the_probe_bear_a_base_in_fp16() -> None:
    """A probe is always measured in fp32, whatever the base is stored in."""
    probe = windows(1)[0]
    model = speech()
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        loss_fn(copy.deepcopy(model), probe[0])  # the twin: without autocast torch refuses

    with GuardedEngine(model, EngineSettings(learning_rate=RATE, precision="fp16")) as engine:
        in_fp16 = engine.evaluate(probe, loss_fn)
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.float16}
        assert engine.step(windows(1)[0], loss_fn).label in {"ok", "calibration"}
    same_model = speech()
    with GuardedEngine(same_model, EngineSettings(learning_rate=RATE)) as engine:
        in_fp32 = engine.evaluate(probe, loss_fn)
        assert engine.step(windows(1)[0], loss_fn).label == "ok"
    assert in_fp16 == in_fp32
    assert None not in in_fp32


def test_the_engine_learns() -> None:
    records, _ = train_guarded(speech(), 15, learning_rate=5e-3)
    assert records[-1].loss < 0.8 * records[0].loss
