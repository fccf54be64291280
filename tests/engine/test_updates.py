"""Updates beside their weights, zeros in gradients, and gradients beside Adam's `eps`."""

import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine, updates
from stability_search.engine.signals import Signals
from stability_search.engine.updates import EpsWatch, UpdateWatch
from stability_search.records.step import StepRecord
from stability_search.settings.engine import EngineSettings
from tests.engine.plain import BreakGradient, train, windows


class Weights(nn.Module):
    """Three matrices and a bias whose gradients are what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.full((2, 2), 3.0))
        self.second = nn.Parameter(torch.full((4, 1), 5.0))
        self.third = nn.Parameter(torch.zeros(1, 2))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((getattr(self, n) * g).sum() for n, g in gradients.items())  # type: ignore[return-value]


def gradients(**more: Any) -> dict[str, torch.Tensor]:
    given = {
        "first": [[0.0, 4.0], [0.0, 3.0]],
        "second": [[1.0], [0.0], [2.0], [2.0]],
        "third": [[6.0, 8.0]],
        "bias": [0.0, 0.0, 0.0],
        **more,
    }
    return {name: torch.tensor(values) for name, values in given.items()}


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(batch)


def looks(count: int, batch: dict[str, torch.Tensor], **settings: Any) -> list[StepRecord]:
    """Return the records of the steps in which somebody looks: 4, 8, ..."""
    chosen = EngineSettings(**{"learning_rate": 0.1, "optimizer": "sgd", **settings})
    with GuardedEngine(Weights(), chosen) as engine:
        records = [engine.step([batch], loss) for _ in range(4 * count)]
    for record in records:
        if record.step % 4:
            assert (record.update_ratio, record.zero_grad_frac) == (None, None)
            assert record.grad_rms_over_eps is None
    return records[3::4]


def test_each_matrix_has_its_turn_in_every_fourth_step() -> None:
    second, third, first, again = looks(4, gradients())
    before = [5.0 - 0.3 * g for g in (1.0, 0.0, 2.0, 2.0)]  # three updates of .1 * gradient
    assert second.update_ratio == pytest.approx(0.1 * 3 / math.hypot(*before), rel=1e-5)
    assert second.zero_grad_frac == 0.25
    assert third.update_ratio == pytest.approx(1 / 7)  # it started from zero, and moves on
    assert third.zero_grad_frac == 0.0
    weights = math.hypot(3.0, 3.0, 3.0 - 1.1 * 4, 3.0 - 1.1 * 3)
    assert first.update_ratio == pytest.approx(0.5 / weights, rel=1e-5)
    assert first.zero_grad_frac == 0.5
    assert again.zero_grad_frac == 0.25


def test_weights_of_zero_have_no_ratio() -> None:
    zero = {"third": [[0.0, 0.0]]}
    _, record, _ = looks(3, gradients(**zero))
    assert (record.is_applied, record.update_ratio, record.zero_grad_frac) == (True, None, 1.0)


def test_a_step_that_is_not_applied_has_none_of_them() -> None:
    with GuardedEngine(Weights(), EngineSettings(learning_rate=0.1)) as engine:
        for _ in range(3):
            engine.step([gradients()], loss)
        record = engine.step([gradients()], lambda m, b: BreakGradient.apply(loss(m, b)))
        later = [engine.step([gradients()], loss) for _ in range(4)][-1]
    assert not record.is_applied
    assert (record.update_ratio, record.zero_grad_frac, record.grad_rms_over_eps) == (None,) * 3
    assert None not in {later.update_ratio, later.zero_grad_frac, later.grad_rms_over_eps}


def test_a_matrix_without_a_gradient_is_passed_by() -> None:
    batch = gradients()
    del batch["second"]
    assert looks(1, batch)[0].update_ratio is None


def test_of_a_large_matrix_only_some_rows_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_MAX_ENTRIES", 5)
    matrix = nn.Parameter(torch.ones(5, 2))  # every third row
    matrix.grad = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    watch, signals = UpdateWatch([matrix]), Signals()
    watch.before_update(1)
    with torch.no_grad():
        matrix[3] -= 0.5
        matrix[1] -= 100.0  # out of sight
    watch.after_update(signals)
    reading = signals.read(torch.tensor(1.0))
    assert reading.update_ratio == pytest.approx(math.hypot(0.5, 0.5) / 2)
    assert reading.zero_grad_frac == 0.75


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_smallest_gradient_is_compared_with_eps(
    precision: str, clip_norm: float | None
) -> None:
    tiny = {"second": [[1e-3], [0.0], [0.0], [0.0]], "third": [[0.0, 0.0]]}
    (record,) = looks(
        1,
        gradients(**tiny),
        optimizer="adamw",
        eps=1e-4,
        precision=precision,
        init_scale=1024.0,
        clip_norm=clip_norm,
    )
    factor = 1.0 if clip_norm is None else 1.0 / math.hypot(5.0, 1e-3)
    # RMS 5e-4 of `second`; `third` has a gradient of zero and `bias` is no matrix
    assert record.grad_rms_over_eps == pytest.approx(5e-4 * factor / 1e-4, rel=1e-4)


def test_sgd_has_no_eps() -> None:
    assert looks(1, gradients())[0].grad_rms_over_eps is None


def test_the_comparison_follows_which_gradients_there_are() -> None:
    model = Weights()
    watch = EpsWatch(torch.optim.AdamW(model.parameters(), eps=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert watch.smallest([8.0, 2.0, 1.0, 0.001]) == pytest.approx(1 / math.sqrt(2))
    model.second.grad = model.third.grad = None
    assert watch.smallest([8.0, 0.001]) == 4.0
    assert watch.smallest([0.0, 0.001]) is None


def test_a_resumed_engine_looks_where_the_other_would_have() -> None:
    data = windows(24)
    chosen = EngineSettings(learning_rate=0.01)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)], nn.Linear(6, 1))

    with GuardedEngine(build(), chosen) as whole:
        expected = [r.update_ratio for r in train(whole, data)]
    with GuardedEngine(build(), chosen) as first:
        train(first, data[:10])
        saved = io.BytesIO()
        torch.save(first.state_dict(), saved)
    saved.seek(0)
    with GuardedEngine(build(), chosen) as second:
        second.load_state_dict(torch.load(saved, weights_only=True))
        assert [r.update_ratio for r in train(second, data[10:])] == expected[10:]
    assert len(set(expected) - {None}) == 6
