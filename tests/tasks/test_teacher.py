"""The teacher: its form, its defects, its yardsticks, and that it learns."""

import dataclasses
import inspect
import math
import statistics
from itertools import islice

import pytest
import torch
from torch import nn

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
from stability_search.tasks.clips import Clip, ClipBatch, collate
from stability_search.tasks.teacher import Teacher
from stability_search.tasks.teacher_model import AttentionFusion, TeacherNetwork, pooled_length
from stability_search.testing import check_task


@pytest.fixture(autouse=True)
def _leave_random_state() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(task: Teacher, size: int = 2, seed: int = 0) -> ClipBatch:
    return next(task.batches(size, generator(seed)))


def probe_loss(task: Teacher, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return statistics.mean(task.probe_loss(model, batch).item() for batch in task.probe())


def train(task: Teacher, learning_rate: float, steps: int) -> nn.Module:
    torch.manual_seed(0)
    model = task.model()
    batches = task.batches(2, generator())
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    for _ in range(steps):
        for batch in islice(batches, 2):
            (task.loss(model, batch) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    "task",
    [
        Teacher(),
        Teacher(variant="stable"),
        Teacher(fusion="weighted_sum", raw_units=True),
        Teacher(input_scale=10.0, hidden=16, heads=2, blocks=1),
        Teacher(size="baseline", hidden=32, blocks=2),
    ],
    ids=["original", "stable", "weighted_sum", "scaled", "baseline"],
)
def test_every_form_keeps_the_contract(task: Teacher) -> None:
    assert check_task(task) == ()
    assert isinstance(task, Task)
    assert isinstance(task, HasBaseline)
    assert isinstance(task, HasMetrics)
    assert isinstance(task, HasProbeLoss)
    assert isinstance(task, HasInitGainParameters)
    assert isinstance(task, HasAblations)
    assert isinstance(task, HasBatchCheck)


def test_no_argument_is_named_like_a_setting_or_a_column() -> None:
    columns = {
        field.name for record in (TrialRow, TrialSummary) for field in dataclasses.fields(record)
    }
    names = set(inspect.signature(Teacher).parameters)
    assert names.isdisjoint(columns | set(SETTING_NAMES))


@pytest.mark.fault  # whole trainings
@pytest.mark.parametrize("variant", ["original", "stable"])
def test_it_learns_what_ignoring_the_input_cannot(variant: str) -> None:
    task = Teacher(variant=variant)  # type: ignore[arg-type]
    model = train(task, 5e-3, 300)
    assert probe_loss(task, model) < task.baseline() / 2
    rates = [task.metrics(model, batch)["word_error_rate"] for batch in task.probe()]
    assert statistics.mean(rates) < 0.5


def test_clean_clips_give_a_finite_loss_at_the_start() -> None:
    task = Teacher()
    model = task.model()
    losses = [task.loss(model, b) for b in islice(task.batches(2, generator()), 50)]
    assert bool(torch.stack(losses).isfinite().all())


def test_a_nan_frame_makes_the_loss_nan_and_the_probe_stays_clean() -> None:
    task = Teacher(nan_frac=1.0)
    batch = batch_of(task)
    assert [int(clip.isnan().any(dim=1).sum()) for clip in batch.frames] == [1, 1]
    assert math.isnan(task.loss(task.model(), batch).item())
    assert all(bool(batch.frames.isfinite().all()) for batch in task.probe())


def test_a_short_clip_makes_the_loss_infinite_and_the_probe_stays_clean() -> None:
    task = Teacher(short_frac=1.0)
    batch = batch_of(task)
    for frames, labels in zip(batch.frame_lengths, batch.label_lengths, strict=True):
        assert pooled_length(frames) < labels
    assert math.isinf(task.loss(task.model(), batch).item())
    assert math.isfinite(probe_loss(task, task.model()))


@pytest.mark.parametrize("name", ["nan_frac", "short_frac"])
def test_the_share_of_defects_is_as_asked_and_other_clips_are_the_same(name: str) -> None:
    clean = islice(Teacher().batches(1, generator()), 400)
    planted = islice(Teacher(**{name: 0.25}).batches(1, generator()), 400)  # type: ignore[arg-type]
    num_changed = sum(
        not torch.equal(left.frames, right.frames)
        for left, right in zip(clean, planted, strict=True)
    )
    assert 70 <= num_changed <= 130


def test_input_scale_multiplies_training_and_probe() -> None:
    plain, scaled = Teacher(), Teacher(input_scale=10.0)
    torch.testing.assert_close(batch_of(scaled).frames, batch_of(plain).frames * 10)
    torch.testing.assert_close(scaled.probe()[0].frames, plain.probe()[0].frames * 10)


def test_the_baseline_is_the_best_constant_prediction() -> None:
    task = Teacher()
    lowest = task.baseline()
    assert 1.5 < lowest < 2.2

    class Constant(nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits)

        def forward(self, frames: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            del padding
            shape = (pooled_length(frames.shape[1]), len(frames), 5)
            return self.logits.log_softmax(0).expand(shape)

    model = Constant(torch.zeros(5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(200):
        torch.stack([task.loss(model, batch) for batch in task.probe()]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = probe_loss(task, model)
    assert lowest <= found + 1e-4
    assert found == pytest.approx(lowest, abs=1e-3)


def test_the_probe_is_the_same_for_every_task_object_and_large_enough() -> None:
    first, second = Teacher().probe(), Teacher(hidden=16).probe()
    assert len(first) >= 6
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left.frames, right.frames)
        assert torch.equal(left.labels, right.labels)


def test_stable_starts_its_projections_small_and_nothing_else() -> None:
    model = Teacher(variant="stable").model()
    for projection in model.projections:
        assert isinstance(projection, nn.Linear)
        bound = 0.5 * math.sqrt(6 / (projection.in_features + projection.out_features))
        assert 0.8 * bound < projection.weight.abs().max().item() <= bound
        assert not projection.bias.any()
    assert model.classifier[-1].bias.any()


def test_init_gain_reaches_the_projection_weights_alone() -> None:
    task = Teacher()
    assert task.init_gain_parameters(task.model()) == [
        "projections.0.weight",
        "projections.1.weight",
        "projections.2.weight",
    ]


def fusion_of(variant: str) -> AttentionFusion:
    model = Teacher(variant=variant).model()  # type: ignore[arg-type]
    assert isinstance(model.fusion, AttentionFusion)
    return model.fusion.eval()


def test_the_original_norm_stands_after_the_sum_and_the_stable_one_before() -> None:
    features = 100 * torch.randn(3, 2, 5, 32)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    original, stable = fusion_of("original"), fusion_of("stable")
    assert original(features, padding).abs().max() < 10
    shortcut = features.mean(dim=0)
    assert (stable(features, padding) - shortcut).abs().max() <= 10.0 + 1e-4


def test_the_stable_output_is_clamped_before_the_shortcut() -> None:
    fusion = fusion_of("stable")
    nn.init.constant_(fusion.attention.out_proj.bias, 1e3)
    features = torch.zeros(3, 2, 5, 32)
    fused = fusion(features, torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(fused, torch.full_like(fused, 10.0))


@pytest.mark.parametrize(("variant", "is_materialised"), [("original", True), ("stable", False)])
def test_only_the_original_materialises_attention_weights(
    variant: str, is_materialised: bool
) -> None:
    fusion, seen = fusion_of(variant), []
    fusion.attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
    fusion(torch.randn(3, 2, 5, 32), torch.zeros(2, 5, dtype=torch.bool))
    assert (seen[0] is not None) is is_materialised


def test_attention_dropout_is_the_variants_unless_named() -> None:
    assert fusion_of("original").attention.dropout == 0.0
    assert fusion_of("stable").attention.dropout == 0.1
    named = Teacher(variant="stable", attention_dropout=0.3).model().fusion
    assert isinstance(named, AttentionFusion)
    assert named.attention.dropout == 0.3


@pytest.mark.parametrize("variant", ["original", "stable"])
def test_attention_does_not_look_at_padding(variant: str) -> None:
    fusion = fusion_of(variant)
    padding = torch.tensor([[False, False, False, True, True], [False] * 5])
    features = torch.randn(3, 2, 5, 32)
    changed = features.clone()
    changed[:, 0, 3:] = 100.0
    torch.testing.assert_close(
        fusion(features, padding)[0, :3], fusion(changed, padding)[0, :3], atol=1e-5, rtol=0
    )
    without = torch.zeros_like(padding)
    assert not torch.allclose(fusion(features, without)[0, :3], fusion(changed, without)[0, :3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "new"}, r"variant: one of original, stable must hold, but got 'new'"),
        ({"size": "huge"}, r"size: one of small, baseline, full must hold"),
        ({"fusion": "sum"}, r"fusion: one of attention, weighted_sum must hold"),
        ({"hidden": 30}, r"hidden: a multiple of 4 .* must hold, but got 30"),
        ({"hidden": 36, "heads": 8}, r"hidden: a multiple of 8 .* must hold, but got 36"),
        ({"hidden": 32.0}, r"hidden: an integer >= 4 must hold, but got 32.0"),
        ({"heads": 0}, r"heads: an integer >= 1"),
        ({"blocks": 0}, r"blocks: an integer >= 1"),
        ({"dropout": 1.0}, r"dropout: 0 <= value < 1"),
        ({"attention_dropout": -0.1}, r"attention_dropout: 0 <= value < 1"),
        ({"input_scale": 0.0}, r"input_scale: finite and > 0"),
        ({"input_scale": math.nan}, r"input_scale: finite and > 0"),
        ({"input_scale": math.inf}, r"input_scale: finite and > 0"),
        ({"nan_frac": 1.5}, r"nan_frac: 0 <= value <= 1"),
        ({"short_frac": math.nan}, r"short_frac: 0 <= value <= 1"),
        ({"fusion": "weighted_sum", "heads": 4}, r"heads: fusion=attention .*when: \{fusion"),
        ({"size": "baseline", "attention_dropout": 0.3}, r"attention_dropout: fusion=attention"),
    ],
)
def test_a_refused_argument_names_rule_and_value(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(**arguments)  # type: ignore[arg-type]


@pytest.mark.fault  # forty million parameters
def test_the_full_model_has_the_size_of_the_field_system_and_takes_a_step() -> None:
    task = Teacher(size="full")
    model = task.model()
    assert 40e6 < sum(parameter.numel() for parameter in model.parameters()) < 50e6
    layers = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Linear)]
    assert len(layers) > 50
    loss = task.loss(model, batch_of(task, size=1))
    loss.backward()
    before = model.classifier[-1].weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert math.isfinite(loss.item())
    assert not torch.equal(before, model.classifier[-1].weight)


def test_the_baseline_size_has_no_attention_and_a_third_of_the_parameters() -> None:
    model = Teacher(size="baseline").model()
    assert 14e6 < sum(parameter.numel() for parameter in model.parameters()) < 17e6
    assert not [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


@pytest.mark.parametrize("variant", ["original", "stable"])
def test_softmax_and_norms_stay_in_fp32_under_autocast(variant: str) -> None:
    task = Teacher(variant=variant)  # type: ignore[arg-type]
    model = task.model()
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm1d):
            module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].dtype))
    batch = batch_of(task)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = model(batch.frames, batch.padding)
    assert log_probs.dtype is torch.float32
    assert seen == [torch.float32] * 3


def test_the_same_seed_builds_the_same_model() -> None:
    def build() -> TeacherNetwork:
        torch.manual_seed(3)
        return Teacher().model()

    left, right = build().state_dict(), build().state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


# -- what `diagnose` asks ---------------------------------------------------------------------


def size_of(arguments: dict[str, object]) -> int:
    model = Teacher(**arguments).model()  # type: ignore[arg-type]
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"heads": 8, "attention_dropout": 0.3, "variant": "stable"},
        {"hidden": 24, "heads": 3},
        {"hidden": 4, "heads": 4, "blocks": 3},
    ],
)
def test_ablations_build_a_teacher_without_attention_and_a_smaller_one(
    arguments: dict[str, object],
) -> None:
    changes = Teacher(**arguments).ablations()  # type: ignore[arg-type]
    assert list(changes) == ["attention_bypassed", "smaller_model"]
    bypassed = Teacher(**{**arguments, **changes["attention_bypassed"]}).model()  # type: ignore[arg-type]
    assert not [m for m in bypassed.modules() if isinstance(m, nn.MultiheadAttention)]
    assert size_of({**arguments, **changes["smaller_model"]}) < size_of(arguments)


def test_the_smaller_teacher_is_that_of_the_checklist() -> None:
    """Half the width, and half of it dropped out."""
    assert Teacher().ablations()["smaller_model"] == {"hidden": 16, "dropout": 0.5}
    assert Teacher(dropout=0.7).ablations()["smaller_model"]["dropout"] == 0.7


def test_an_ablation_that_is_the_case_already_is_left_out() -> None:
    assert list(Teacher(fusion="weighted_sum").ablations()) == ["smaller_model"]
    assert list(Teacher(hidden=4, heads=1, blocks=1).ablations()) == ["attention_bypassed"]


def test_a_batch_check_names_labels_that_do_not_fit() -> None:
    clips = [
        Clip(frames=torch.zeros(8, 12), labels=(1, 2)),
        Clip(frames=torch.zeros(8, 12), labels=(3, 3)),
        Clip(frames=torch.zeros(40, 12), labels=(1, 5, 0)),
    ]
    short, unknown = Teacher().check_batch(collate(clips))
    assert short == (
        "clip 1: its 2 labels need 3 frames of the model's output, but its 8 frames give 2; the "
        "CTC loss is Inf."
    )
    assert unknown == "clip 2: labels must lie in 1 to 4, but it has 0, 5."


def test_the_batch_check_agrees_with_the_loss() -> None:
    task = Teacher(short_frac=0.5)
    model = task.model()
    batches = list(islice(task.batches(1, generator()), 20))
    told = [bool(task.check_batch(batch)) for batch in batches]
    assert told == [math.isinf(task.loss(model, batch).item()) for batch in batches]
    assert 0 < sum(told) < 20
    assert not any(task.check_batch(batch) for batch in task.probe())
