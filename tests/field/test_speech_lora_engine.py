"""The engine trains fp16 adapters as fp32 master weights, at the very settings that crashed."""

import copy
import re
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine, precision
from stability_search.errors import UsageError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from stability_search.tasks.speech_lora import AdapterDtype, SpeechLora
from stability_search.tasks.speech_lora_model import SpeakerClassifier
from stability_search.trial import run_trial
from tests.engine.plain import same
from tests.field.cases.speech_lora import (
    ACCUMULATION,
    AS_MEANT,
    BATCH_SIZE,
    BEFORE,
    RATE,
    TRAINER_CLIP_NORM,
    Training,
)

pytestmark = pytest.mark.fault  # whole trainings

SEEDS = range(5)
NUM_STEPS = 4
MASTERS = "trainable parameters were stored in float16; they are kept as fp32 master weights"
NO_BF16 = "precision: Turing has no bf16"


def settings(**more: object) -> EngineSettings:
    """Return what the team trained with when it failed."""
    chosen: dict[str, object] = {
        "learning_rate": RATE,
        "precision": "fp16",
        "clip_norm": TRAINER_CLIP_NORM,
        "gradient_checkpointing": True,
    }
    return EngineSettings(**{**chosen, **more})  # type: ignore[arg-type]


def built(seed: int = 0, adapter_dtype: AdapterDtype = "fp16") -> SpeakerClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SpeechLora(adapter_dtype=adapter_dtype).model()


def train_guarded(
    model: nn.Module, chosen: EngineSettings, *, seed: int = 0, num_steps: int = NUM_STEPS
) -> tuple[list[StepRecord], tuple[str, ...]]:
    task = SpeechLora()
    batches = task.batches(BATCH_SIZE, torch.Generator().manual_seed(seed))
    with GuardedEngine(model, chosen) as engine:
        records = [
            engine.step(list(islice(batches, ACCUMULATION)), task.loss) for _ in range(num_steps)
        ]
        return records, engine.notes


def masters(notes: tuple[str, ...]) -> list[str]:
    return [note for note in notes if MASTERS in note]


@pytest.mark.parametrize("seed", SEEDS)
def test_at_the_settings_that_crashed_the_adapters_are_trained_in_fp32(seed: int) -> None:
    model = built(seed)
    before = copy.deepcopy(model)
    records, notes = train_guarded(model, settings(), seed=seed)

    assert [record.label for record in records] == [StepLabel.OK] * NUM_STEPS
    assert all(record.is_applied and record.clipped for record in records)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if new.requires_grad:
            assert new.dtype == torch.float32, name
            assert 0 < (new - old).abs().max().item() < 1.1 * NUM_STEPS * RATE, name
        else:
            assert new.dtype == torch.float16, name
            assert torch.equal(new, old), name
    assert len(masters(notes)) == 1


def test_it_is_said_once_with_the_memory_it_costs() -> None:
    model = built()
    num_values = sum(p.numel() for p in model.parameters() if p.dtype == torch.float16)
    num_stored = sum(
        p.numel() for p in model.parameters() if p.requires_grad and p.dtype == torch.float16
    )
    assert 0 < num_stored < num_values
    _, notes = train_guarded(model, settings(), num_steps=2)
    (note,) = masters(notes)
    mib = re.search(r"master weights, ([\d.]+) MiB more, and ([\d.]+) MiB more for", note)
    assert mib is not None
    weights = num_stored * 2 / 2**20  # two more bytes a number; as much for each Adam moment
    assert float(mib.group(1)) == pytest.approx(weights, abs=0.05)
    assert float(mib.group(2)) == pytest.approx(3 * weights, abs=0.05)


def test_with_fp32_adapters_there_is_nothing_to_say() -> None:
    """The twin."""
    _, notes = train_guarded(built(adapter_dtype="fp32"), settings(), num_steps=1)
    assert not masters(notes)


@pytest.mark.parametrize("clip_norm", [TRAINER_CLIP_NORM, None], ids=["clipped", "not clipped"])
def test_it_trains_to_the_bit_as_the_teams_loop_with_fp32_adapters(
    clip_norm: float | None,
) -> None:
    """Both keep the weights that fp16 had; only what is stored from then on differs."""
    by_hand = Training(replace(BEFORE, clip_norm=clip_norm), seed=0)
    for parameter in by_hand.trained:
        parameter.data = parameter.data.float()
    losses = [by_hand.step() for _ in range(NUM_STEPS)]
    guarded = built()
    records, _ = train_guarded(guarded, settings(clip_norm=clip_norm, fp16_on_cpu="native"))
    assert [record.loss for record in records] == pytest.approx(losses, rel=1e-6)
    assert same(guarded.state_dict(), by_hand.model.state_dict())


def test_checkpointing_changes_no_bit() -> None:
    kept, recomputed = built(), built()
    train_guarded(kept, settings(gradient_checkpointing=False))
    train_guarded(recomputed, settings(gradient_checkpointing=True))
    assert same(kept.state_dict(), recomputed.state_dict())


def test_the_probe_is_measured_in_fp32_and_the_encoder_stays_in_fp16() -> None:
    task, model = SpeechLora(), built()
    with GuardedEngine(model, settings()) as engine:
        in_fp16 = engine.evaluate(task.probe(), task.loss)
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    with GuardedEngine(built(), settings(precision="fp32")) as engine:
        in_fp32 = engine.evaluate(task.probe(), task.loss)
    assert frozen == {torch.float16}
    assert in_fp16 == in_fp32
    assert None not in in_fp32


def test_it_learns_without_an_unstable_step_where_the_teams_cure_ends_in_nan() -> None:
    """`test_speech_lora_loops` shows that cure at the same rate."""
    chosen = settings(learning_rate=1e-2, clip_norm=None, gradient_checkpointing=False)
    records, _ = train_guarded(built(), chosen, num_steps=25)
    assert {record.label for record in records} <= {StepLabel.OK, StepLabel.CALIBRATION}
    assert records[-1].loss is not None
    assert records[-1].loss < 1.0


# -- a card without bf16 ----------------------------------------------------------------------


@pytest.fixture
def _on_a_turing_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine take this CPU for a card that only imitates bf16."""
    check = precision.check_precision
    card = torch.device("cuda")
    monkeypatch.setattr(precision, "check_precision", lambda chosen, _device: check(chosen, card))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "Turing")


def trial(chosen: str) -> TrialSummary:
    config = TrialConfig(
        task=TaskReference(module="stability_search.tasks.speech_lora", class_name="SpeechLora"),
        engine=settings(precision=chosen, num_planned_steps=2),
        batch_size=2,
        accumulation_steps=2,
        num_planned_steps=2,
    )
    running = run_trial(config, constants=TrialConstants(probe_steps=(0,)), preflight=[config])
    try:
        while True:
            next(running)
    except StopIteration as stopped:
        summary: TrialSummary = stopped.value
        return summary


@pytest.mark.usefixtures("_on_a_turing_card")
def test_bf16_on_a_card_without_it_is_an_error_before_the_first_step() -> None:
    model = built()
    with pytest.raises(UsageError, match=NO_BF16):
        GuardedEngine(model, settings(precision="bf16"))
    assert same(model.state_dict(), built().state_dict())  # refused before anything was changed

    summary = trial("bf16")
    assert (summary.outcome, summary.num_steps) == (Outcome.USER_ERROR, 0)
    assert summary.error_type == "UsageError"
    assert NO_BF16 in summary.reason
    assert "Use fp32 or fp16" in summary.reason


@pytest.mark.usefixtures("_on_a_turing_card")
def test_fp16_on_such_a_card_is_trained() -> None:
    """The twin; and what was done with the adapters is in the trial's record, once."""
    summary = trial("fp16")
    assert (summary.outcome, summary.num_steps) == (Outcome.COMPLETED, 2)
    assert len(masters(summary.warnings)) == 1


def test_the_cure_as_meant_starts_where_the_failing_loop_did() -> None:
    """What makes the loops comparable: fp16 adapters are the fp32 ones, rounded."""
    fp16, fp32 = Training(BEFORE, seed=0), Training(AS_MEANT, seed=0)
    for stored, single in zip(fp16.adapters(), fp32.adapters(), strict=True):
        assert torch.equal(stored, single.half())
