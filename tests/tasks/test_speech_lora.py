"""The speech model: a frozen half-precision encoder, adapters, a head, and that it learns."""

import dataclasses
import inspect
import math
import re
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import stability_search.tasks
from stability_search.engine.checkpointing import require_blocks
from stability_search.records.trial import TrialRow, TrialSummary
from stability_search.settings.trial import SETTING_NAMES
from stability_search.tasks.base import (
    HasAblations,
    HasBaseline,
    HasBatchCheck,
    HasInitGainParameters,
    HasMetrics,
    HasProbeLoss,
    Task,
)
from stability_search.tasks.lora import LoraLinear
from stability_search.tasks.speech_lora import SpeechLora
from stability_search.tasks.speech_lora_model import SpeakerClassifier
from stability_search.tasks.utterances import Utterance, UtteranceBatch, collate
from stability_search.testing import check_task

TINY = {"width": 8, "heads": 2, "layers": 1, "rank": 2}


@pytest.fixture(autouse=True)
def _leave_random_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def tiny(**more: Any) -> SpeechLora:  # noqa: ANN401 - any argument
    return SpeechLora(**{**TINY, **more})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(task: SpeechLora, size: int = 4) -> UtteranceBatch:
    return next(task.batches(size, generator()))


def probe_loss(task: SpeechLora, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return statistics.mean(task.probe_loss(model, batch).item() for batch in task.probe())


@pytest.mark.parametrize(
    "changed",
    [{}, {"adapter_dtype": "fp32"}, {"mixing": "mean"}],
    ids=["as given", "fp32 adapters", "mean"],
)
def test_every_form_keeps_the_contract(changed: dict[str, Any]) -> None:
    task = tiny(**changed)
    assert check_task(task) == ()
    for protocol in (Task, HasBaseline, HasMetrics, HasInitGainParameters, HasAblations):
        assert isinstance(task, protocol)
    assert isinstance(task, HasBatchCheck)
    assert isinstance(task, HasProbeLoss)


def test_no_argument_is_named_like_a_setting_or_a_column() -> None:
    columns = {
        field.name for record in (TrialRow, TrialSummary) for field in dataclasses.fields(record)
    }
    names = set(inspect.signature(SpeechLora).parameters)
    assert names.isdisjoint(columns | set(SETTING_NAMES))


# -- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter_dtype", "stored"), [("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_encoder_is_frozen_in_fp16_and_the_head_is_trained_in_fp32(
    adapter_dtype: str, stored: torch.dtype
) -> None:
    model = SpeechLora(adapter_dtype=adapter_dtype).model()  # type: ignore[arg-type]
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert frozen == {torch.float16}
    assert {trained.pop("head.weight"), trained.pop("head.bias")} == {torch.float32}
    assert set(trained.values()) == {stored}
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert adapted == [
        f"encoder.blocks.{block}.mixing.{layer}"
        for block in (0, 1)
        for layer in ("query", "value")
    ]


def test_every_trial_adapts_the_same_encoder_with_new_adapters() -> None:
    task = tiny()
    first, second = task.model(), task.model()
    again = tiny().model()
    for name, parameter in first.named_parameters():
        other = second.get_parameter(name)
        assert other is not parameter
        is_random = parameter.requires_grad and not name.endswith("up.weight")
        assert torch.equal(parameter, other) is not is_random, name
        if not parameter.requires_grad:
            assert torch.equal(parameter, again.get_parameter(name)), name


def test_building_the_task_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    tiny()
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_finds_its_blocks() -> None:
    own, blocks = require_blocks(SpeechLora(layers=3).model())
    assert not own
    assert list(blocks) == ["encoder.blocks.0", "encoder.blocks.1", "encoder.blocks.2"]


@pytest.mark.parametrize("mixing", ["attention", "mean"])
def test_an_utterance_means_the_same_whatever_stands_beside_it(mixing: str) -> None:
    task = tiny(mixing=mixing)
    model = task.model().eval()
    short, long = (
        Utterance(frames=torch.randn(num, 12, generator=generator(num)), label=0)
        for num in (7, 29)
    )
    with torch.no_grad():
        alone = [
            model(batch.frames, batch.padding) for batch in (collate([short]), collate([long]))
        ]
        batch = collate([short, long])
        together = model(batch.frames, batch.padding)
    torch.testing.assert_close(together, torch.cat(alone))


def test_mean_mixing_has_no_attention_and_attention_has() -> None:
    def attends(mixing: str) -> bool:
        seen = []
        task = tiny(mixing=mixing)
        attend = F.scaled_dot_product_attention
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                F,
                "scaled_dot_product_attention",
                lambda *args, **kwargs: seen.append(1) or attend(*args, **kwargs),
            )
            task.loss(task.model(), batch_of(task))
        return bool(seen)

    assert attends("attention")
    assert not attends("mean")


def test_norms_and_logits_stay_in_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    norm = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: seen.append(x.dtype) or norm(x, *args))
    task = tiny()
    batch = batch_of(task)
    with torch.autocast("cpu", torch.bfloat16):
        logits = task.model()(batch.frames, batch.padding)
        loss = task.loss(task.model(), batch)
    assert logits.dtype == loss.dtype == torch.float32
    assert set(seen) == {torch.float32}


# -- yardsticks -------------------------------------------------------------------------------


def test_the_probe_is_128_held_out_utterances_of_all_speakers() -> None:
    probe = SpeechLora().probe()
    assert [len(batch.labels) for batch in probe] == [16] * 8
    assert {label for batch in probe for label in batch.labels.tolist()} == set(range(9))


def test_the_baseline_is_the_best_constant_prediction() -> None:
    task = tiny()
    assert 2.0 < task.baseline() < math.log(9)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(9))

        def forward(self, frames: torch.Tensor, _padding: torch.Tensor) -> torch.Tensor:
            return self.logits.expand(len(frames), -1)

    constant = Constant()
    optimizer = torch.optim.SGD(constant.parameters(), lr=2.0)
    for _ in range(60):
        optimizer.zero_grad()
        torch.stack([task.loss(constant, batch) for batch in task.probe()]).mean().backward()
        optimizer.step()
    assert probe_loss(task, constant) == pytest.approx(task.baseline(), abs=1e-3)


def test_accuracy_counts_the_speaker_that_comes_first() -> None:
    task = tiny()
    batch = collate([Utterance(frames=torch.ones(4, 12), label=label) for label in (0, 1, 1, 1)])

    class AlwaysOne(nn.Module):
        def forward(self, frames: torch.Tensor, _padding: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.ones(len(frames), dtype=torch.long), 9).float()

    assert task.metrics(AlwaysOne(), batch) == {"accuracy": 0.75}


def test_the_gain_acts_on_the_adapters_first_matrices() -> None:
    task = SpeechLora()
    names = task.init_gain_parameters(task.model())
    assert len(names) == 4
    assert all(name.endswith(("query.down.weight", "value.down.weight")) for name in names)


# -- what diagnose asks for -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "ablations"),
    [
        ({}, {"attention_bypassed", "smaller_model"}),
        ({"mixing": "mean"}, {"smaller_model"}),
        ({"heads": 3, "width": 66}, {"attention_bypassed", "smaller_model"}),
        ({"width": 32, "layers": 1}, {"attention_bypassed"}),
        ({"width": 16, "layers": 1, "mixing": "mean"}, set()),
    ],
)
def test_ablations_build_what_they_say(changed: dict[str, Any], ablations: set[str]) -> None:
    found = SpeechLora(**changed).ablations()
    assert set(found) == ablations

    def num_parameters(arguments: dict[str, Any]) -> int:
        model: SpeakerClassifier = SpeechLora(**{**changed, **arguments}).model()
        return sum(parameter.numel() for parameter in model.parameters())

    assert all(num_parameters(arguments) < num_parameters({}) for arguments in found.values())


def test_a_sample_that_cannot_be_learned_from_is_named() -> None:
    task = tiny()
    good = batch_of(task)
    assert not task.check_batch(good)
    assert not [problem for batch in task.probe() for problem in task.check_batch(batch)]
    bad = collate(
        [
            Utterance(frames=torch.ones(3, 12), label=9),
            Utterance(frames=torch.ones(0, 12), label=0),
            Utterance(frames=torch.ones(3, 12), label=-1),
        ]
    )
    assert task.check_batch(bad) == [
        "utterance 0 has the label 9, but labels go from 0 to 8",
        "utterance 1 has no frame, so its mean is NaN",
        "utterance 2 has the label -1, but labels go from 0 to 8",
    ]


def test_every_wrong_argument_is_named_at_once() -> None:
    with pytest.raises(ValueError, match="rank") as caught:
        SpeechLora(
            rank=0,
            layers=1.5,  # type: ignore[arg-type]
            adapter_dtype="half",  # type: ignore[arg-type]
            mixing="sum",  # type: ignore[arg-type]
            alpha=np.nan,
        )
    assert str(caught.value) == (
        "rank: an integer >= 1 must hold, but got 0. "
        "layers: an integer >= 1 must hold, but got 1.5. "
        "adapter_dtype: one of fp16, fp32 must hold, but got 'half'. "
        "mixing: one of attention, mean must hold, but got 'sum'. "
        "alpha: finite and > 0 must hold, but got nan."
    )
    with pytest.raises(ValueError, match=r"width: a multiple of 2 and of 4 \(heads\).* got 30"):
        SpeechLora(width=30)
    with pytest.raises(ValueError, match=r"width: a multiple of 2 and of 3 \(heads\).* got 33"):
        SpeechLora(width=33, heads=3)


def test_every_argument_is_listed_in_the_readme() -> None:
    text = (Path(stability_search.tasks.__file__).parent / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## `speech_lora`")[1].split("\n## ")[0]
    rows = section.split("| argument |")[1].split("\n\n")[0].splitlines()[2:]
    names = [name for row in rows for name in re.findall(r"`(\w+)", row.split("|")[1])]
    assert names == list(inspect.signature(SpeechLora).parameters)


@pytest.mark.fault  # a whole training
def test_it_learns_what_ignoring_the_input_cannot() -> None:
    task = SpeechLora(adapter_dtype="fp32")
    model = task.model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, fused=True)
    for batch in islice(task.batches(32, generator()), 60):
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probe_loss(task, model) < task.baseline() / 4
    accuracies = [task.metrics(model, batch)["accuracy"] for batch in task.probe()]
    assert statistics.mean(accuracies) > 0.85
