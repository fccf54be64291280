"""Unscaling on every micro-batch breaks torch's scaler under accumulation; the engine trains.

A detector with five weighted loss terms, accumulation 4, fp16. The team's loop called `unscale_`
on every micro-batch for its NaN check and stepped every fourth. With a handler that catches the
error and starts over it fails at every odd batch, and no step is ever taken.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records import StepLabel, StepRecord
from stability_search.settings import EngineSettings
from tests.engine.plain import same

pytestmark = pytest.mark.fault  # whole trainings

ACCUMULATION, CLIP_NORM, RATE = 4, 10.0, 1e-4  # the team's
WEIGHTS = {"box": 7.5, "class": 0.5, "contrastive": 1.0, "cpe": 0.5, "triplet": 0.2}
CLASSES, SIZE, SCALE = 3, 6, 1024.0
LOUD = 6.0  # brings similarities in `cpe` beyond 11.09, where an exponential overflows in fp16

Batch = dict[str, torch.Tensor]


class Detector(nn.Module):
    """A box, a class and an embedding for each small image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.box = nn.Linear(32, 4)
        self.classes = nn.Linear(32, CLASSES)
        self.embedding = nn.Linear(36, 8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        features = self.features(images).flatten(1)
        corners = F.avg_pool2d(images, 4).flatten(1)  # not normalised
        embedding = self.embedding(torch.cat([features, corners], dim=1))
        return torch.sigmoid(self.box(features).float()), self.classes(features), embedding


def loss_terms(model: nn.Module, batch: Batch, *, is_clamped: bool = False) -> Batch:
    """Compute the five weighted terms; `cpe` is left in the embedding's precision, as theirs."""
    boxes, logits, embedding = model(batch["images"])
    pairs = batch["labels"][:, None] == batch["labels"]
    unit = F.normalize(embedding.float(), dim=1)
    cosines = unit @ unit.T
    similarities = embedding @ embedding.T / 2
    if is_clamped:  # the team's cure
        similarities = similarities.clamp(max=5.0)
    weights = similarities.exp()
    terms = {
        "box": 1 - iou(boxes, batch["boxes"]).mean(),
        "class": F.cross_entropy(logits.float(), batch["labels"]),
        "contrastive": -(F.log_softmax(cosines / 0.5, dim=1) * pairs).sum() / pairs.sum(),
        "cpe": -((weights * pairs).sum(1) / weights.sum(1)).log().mean(),
        "triplet": F.relu(cosines * ~pairs - cosines * pairs + 0.3).mean(),
    }
    return {name: WEIGHTS[name] * term for name, term in terms.items()}


def iou(boxes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compare boxes given as centre and size, all in (0, 1)."""
    low = torch.maximum(boxes[:, :2] - boxes[:, 2:] / 2, targets[:, :2] - targets[:, 2:] / 2)
    high = torch.minimum(boxes[:, :2] + boxes[:, 2:] / 2, targets[:, :2] + targets[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    return shared / (boxes[:, 2:].prod(1) + targets[:, 2:].prod(1) - shared)


def total(model: nn.Module, batch: Batch) -> torch.Tensor:
    return torch.stack([term.float() for term in loss_terms(model, batch).values()]).sum()


def batches(count: int, *, loud: int | None = None) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(count):
        labels = torch.arange(SIZE) % CLASSES
        images = 0.3 * torch.randn(SIZE, 1, 8, 8, generator=generator)
        images += labels.float()[:, None, None, None]
        boxes = 0.3 + 0.1 * torch.rand(SIZE, 4, generator=generator)
        factor = LOUD if index == loud else 1.0
        made.append({"images": images * factor, "labels": labels, "boxes": boxes})
    return made


# -- the team's loop -------------------------------------------------------------------------


def train_as_the_team(
    model: nn.Module, data: list[Batch], *, has_handler: bool = False, unscales_each: bool = True
) -> tuple[list[int], list[int]]:
    """Train with torch's scaler.

    Returns:
        Index of the batches that failed, and of those that a step was taken at.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    failed, stepped = [], []
    for index, batch in enumerate(data):
        is_last = (index + 1) % ACCUMULATION == 0
        try:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = total(model, batch)
            scaler.scale(loss / ACCUMULATION).backward()
            if unscales_each or is_last:
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf)
                assert math.isfinite(norm.item())  # their check for NaN
            if is_last:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                stepped.append(index)
        except RuntimeError:
            if not has_handler:
                raise
            failed.append(index)
            scaler.update()
            optimizer.zero_grad()
    return failed, stepped


def train_guarded(
    model: nn.Module,
    data: list[Batch],
    loss: Callable[[nn.Module, Batch], Batch] = loss_terms,
    **more: object,
) -> list[StepRecord]:
    chosen = {"learning_rate": RATE, "precision": "fp16", "init_scale": SCALE} | more
    settings = EngineSettings(**chosen, clip_norm=CLIP_NORM)
    with GuardedEngine(model, settings, reference=Detector) as engine:
        return [
            engine.step(data[start : start + ACCUMULATION], loss)
            for start in range(0, len(data), ACCUMULATION)
        ]


def parameters(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_unscaling_every_micro_batch_crashes_at_the_second() -> None:
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        train_as_the_team(Detector(), batches(2))
    assert train_as_the_team(Detector(), batches(1)) == ([], [])


def test_with_their_handler_every_odd_batch_fails_and_no_step_is_taken() -> None:
    model = Detector()
    before = parameters(model)
    failed, stepped = train_as_the_team(model, batches(16), has_handler=True)
    assert failed == [1, 3, 5, 7, 9, 11, 13, 15]
    assert stepped == []
    assert same(before, parameters(model))


def test_unscaling_at_the_windows_end_trains() -> None:
    """The twin: the crash is the loop's, not the model's."""
    model = Detector()
    before = parameters(model)
    assert train_as_the_team(model, batches(16), unscales_each=False) == ([], [3, 7, 11, 15])
    assert not same(before, parameters(model))


def test_the_engine_trains_as_the_mended_loop_does_to_the_bit() -> None:
    guarded, by_hand = Detector(), Detector()
    records = train_guarded(guarded, batches(16), fp16_on_cpu="native")
    train_as_the_team(by_hand, batches(16), unscales_each=False)

    assert [record.label for record in records] == [StepLabel.OK] * 4
    assert all(record.is_applied for record in records)
    assert same(parameters(guarded), parameters(by_hand))


def test_the_engine_learns_every_term() -> None:
    records = train_guarded(Detector(), batches(8) * 15, learning_rate=3e-3)
    first, last = records[0], records[-1]
    assert {record.label for record in records} == {StepLabel.OK}
    assert list(first.loss_terms) == list(WEIGHTS)
    assert sum(first.loss_terms.values()) == pytest.approx(first.loss, rel=1e-3)
    assert last.loss < 0.7 * first.loss


def test_the_engine_names_the_term_that_went_nan_and_trains_on_the_rest() -> None:
    """The batch is sound: fp32 bears it, and so does the initial model."""
    model = Detector()
    before = parameters(model)
    records = train_guarded(model, batches(16, loud=6))

    assert [record.label for record in records] == [
        *(StepLabel.OK, StepLabel.BAD, StepLabel.OK, StepLabel.OK)
    ]
    assert (records[1].reason, records[1].batch_index) == ("loss term cpe is NaN", 6)
    assert [name for name, term in records[1].loss_terms.items() if term is None] == ["cpe"]
    assert records[1].first_nonfinite_phase == "loss"
    assert all(record.is_applied for record in records)
    assert {record.scale for record in records} == {SCALE}
    assert not same(before, parameters(model))

    in_fp32 = train_guarded(Detector(), batches(16, loud=6), precision="fp32")
    assert {record.label for record in in_fp32} == {StepLabel.OK}


def test_their_clamp_on_the_similarity_cures_the_term() -> None:
    def clamped(model: nn.Module, batch: Batch) -> Batch:
        return loss_terms(model, batch, is_clamped=True)

    records = train_guarded(Detector(), batches(16, loud=6), clamped)
    assert {record.label for record in records} == {StepLabel.OK}


def test_the_loud_batch_ends_a_loop_without_guards() -> None:
    """The twin: one such batch, and every gradient is NaN."""
    model = Detector()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = total(model, batches(7, loud=6)[6])
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert math.isnan(norm.item())
