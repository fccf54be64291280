"""Statistics of batches of any shape, and what is wrong with single ones."""

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stability_search.diagnose.batch_statistics import (
    MIN_BATCHES,
    DataReport,
    DefectKind,
    FieldStatistics,
    range_hints,
    read_batches,
)

NUM_BATCHES = 10


@dataclass
class Nest:
    """A batch as tasks have them."""

    frames: Tensor
    more: dict[str, Any]


class Plain:
    """A task of batches that a test hands in; trains nothing."""

    def __init__(self, batches: Sequence[Any], probe: Sequence[Any] = ()) -> None:
        self._batches = batches
        self._probe = probe

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Any]:  # noqa: ARG002
        yield from self._batches

    def probe(self) -> Sequence[Any]:
        return self._probe

    def loss(self, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401, ARG002
        return torch.zeros(())


class Checked(Plain):
    """Says of every batch that is all zeros that it cannot be learned from."""

    def check_batch(self, batch: Tensor) -> list[str]:
        return [] if bool(batch.any()) else ["a label of nothing"]


def read(task: Plain, num_batches: int = NUM_BATCHES) -> DataReport:
    stream = task.batches(2, torch.Generator())
    return read_batches(task, stream, num_batches=num_batches)[0]


def normal(count: int = NUM_BATCHES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 4, generator=generator) for _ in range(count)]


def kinds(report: DataReport) -> list[tuple[str, int]]:
    return [(defect.kind.value, defect.batch_index) for defect in report.defects]


def test_statistics_are_those_of_all_values_of_all_batches() -> None:
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0], [0.0, 0.0]])]
    (row,) = read(Plain(batches)).training
    assert (row.name, row.dtype, row.shape, row.is_ragged) == ("", "float32", (1, 2), False)
    assert (row.low, row.high, row.mean) == (0.0, 6.0, 2.0)
    assert row.std == pytest.approx(torch.tensor([1.0, 2, 3, 6, 0, 0]).std(correction=0).item())


def test_the_deviation_of_large_numbers_does_not_cancel() -> None:
    generator = torch.Generator().manual_seed(0)
    far = [torch.randn(64, generator=generator, dtype=torch.float64) * 5 + 1.7e9 for _ in "1234"]
    (row,) = read(Plain(far)).training
    assert row.std == pytest.approx(float(torch.cat(far).std(correction=0)), rel=1e-6)
    assert "every value" not in "".join(range_hints(row))
    apart = [batch + 100 * number for number, batch in enumerate(far)]
    (row,) = read(Plain(apart)).training
    assert row.std == pytest.approx(float(torch.cat(apart).std(correction=0)), rel=1e-6)
    assert row.mean == pytest.approx(float(torch.cat(apart).mean()), rel=1e-12)
    (row,) = read(Plain([torch.full((3,), 7.0)] * 4)).training
    assert row.std == 0.0
    assert "every value is 7" in "".join(range_hints(row))


def test_no_batch_is_kept_once_it_was_looked_at() -> None:
    drawn: list[weakref.ref[Tensor]] = []
    most = 0

    def batches() -> Iterator[Tensor]:
        nonlocal most
        for number in range(NUM_BATCHES):
            most = max(most, sum(one() is not None for one in drawn))
            batch = torch.full((2, 4), 1e4 if number == 4 else 1.0)
            drawn.append(weakref.ref(batch))
            yield batch
            del batch

    report, _ = read_batches(Plain([]), batches(), num_batches=NUM_BATCHES)
    assert most <= 1, "only the one that the loop still holds"
    assert kinds(report) == [("outlier", 4)], "known only once all were seen"


def test_every_tensor_of_a_nest_is_named_and_integers_are_told_apart() -> None:
    nest = Nest(frames=torch.ones(2, 3), more={"labels": [torch.tensor([1, 2])]})
    rows = read(Plain([nest])).training
    assert [(row.name, row.is_float) for row in rows] == [
        (".frames", True),
        (".more['labels'][0]", False),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_batch_with_nan_or_inf_is_named_by_its_index(value: float) -> None:
    batches = normal()
    assert not read(Plain(batches)).defects
    batches[3][0, 0] = value
    report = read(Plain(batches))
    assert kinds(report) == [("nonfinite", 3)]
    assert ("NaN" if math.isnan(value) else "Inf") in report.defects[0].text
    assert report.training[0].num_nan + report.training[0].num_inf == 1
    assert report.training[0].mean is not None  # of the finite values


def test_minus_inf_that_the_first_batch_has_is_a_mask() -> None:
    batches = [torch.tensor([[0.0, -math.inf]]) for _ in range(3)]
    assert not read(Plain(batches)).defects


def test_a_batch_far_larger_than_the_others_is_an_outlier_and_a_loud_one_is_not() -> None:
    batches = normal()
    batches[4] *= 50.0
    assert not read(Plain(batches)).defects
    batches[4] *= 50.0
    assert kinds(read(Plain(batches))) == [("outlier", 4)]


def test_few_batches_are_not_compared_and_that_is_said() -> None:
    batches = normal(MIN_BATCHES - 1)
    batches[2] *= 1e6
    report = read(Plain(batches))
    assert not report.defects
    assert any("not compared" in text for text in report.unchecked)


def test_the_tasks_own_check_is_asked_and_its_absence_is_said() -> None:
    batches = normal(3)
    batches[1].zero_()
    report = read(Checked(batches, probe=[torch.zeros(1, 1)]))
    assert [(d.source, d.batch_index, d.text) for d in report.defects] == [
        ("training", 1, "a label of nothing"),
        ("probe", 0, "a label of nothing"),
    ]
    assert report.num_defects == {"misfit": 2}
    assert report.has(DefectKind.MISFIT)
    assert not report.has(DefectKind.OUTLIER)
    assert not any("check_batch" in text for text in report.unchecked)
    assert any("check_batch" in text for text in read(Plain(batches)).unchecked)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"high": 300.0}, "values from -4 to 300"),
        ({"std": 40.0}, "standard deviation 40"),
        ({"std": 0.01}, "standard deviation 0.01"),
        ({"mean": 5.0}, "mean 5"),
        ({"std": 0.0, "low": 2.0, "high": 2.0}, "every value is 2"),
        ({"is_float": False, "high": 300.0}, ""),
        ({"mean": None}, ""),
    ],
)
def test_hints_say_what_is_far_from_a_normalised_input(
    changes: dict[str, Any], words: str
) -> None:
    usual: dict[str, Any] = {
        "name": ".x", "dtype": "float32", "is_float": True, "shape": (2, 3), "is_ragged": False,
        "low": -4.0, "high": 4.5, "mean": 0.1, "std": 1.0, "num_nan": 0, "num_inf": 0,
    }  # fmt: skip
    hints = range_hints(FieldStatistics(**{**usual, **changes}))
    assert bool(hints) == bool(words)
    assert words in "".join(hints)


def test_reading_ends_after_its_time() -> None:
    ticks = iter(range(0, 1000, 3))
    task = Plain(normal())
    stream = task.batches(2, torch.Generator())
    report, _ = read_batches(task, stream, num_batches=10, clock=lambda: float(next(ticks)))
    assert report.num_training_batches == 3


def test_the_sieve_finds_the_same_batches_again() -> None:
    batches = normal()
    batches[4] *= 1e4
    task = Checked(batches)
    _, sieve = read_batches(task, iter(batches), num_batches=NUM_BATCHES)
    assert [bool(sieve.faults(batch)) for batch in batches] == [i == 4 for i in range(10)]
    assert [kind for kind, _ in sieve.faults(torch.zeros(2, 4))] == [DefectKind.MISFIT]
