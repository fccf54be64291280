"""Statistics of the batches against what training expects: range, mean, deviation, NaN, targets.

Works on any nest of tensors. What breaks a step (NaN, Inf, a target that does not fit, a batch a
hundred times larger than the others) is a defect of a batch; an odd range is a hint on a field.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, Literal

import torch

from stability_search.engine.batches import tensors
from stability_search.records.values import finite_or_none
from stability_search.tasks.base import HasBatchCheck, Task

OUTLIER_FACTOR = 100.0  # judgement: no loader's batches differ by as much for a good reason
MIN_BATCHES = 8  # fewer say nothing about what is usual
LARGEST_EXPECTED = 20.0  # four times the usual +-5 of a normalised input
WIDEST_STD, NARROWEST_STD = 3.0, 0.1
LARGEST_MEAN = 1.0
MAX_LISTED = 12  # findings of one kind that are listed
READ_S = 8.0  # seconds spent on reading training batches at most

Source = Literal["training", "probe"]
Faults = list[tuple["DefectKind", str]]


class DefectKind(StrEnum):
    """What can be wrong with one batch."""

    NONFINITE = "nonfinite"
    MISFIT = "misfit"  # `check_batch` says so
    OUTLIER = "outlier"


@dataclass(frozen=True, kw_only=True, slots=True)
class Defect:
    """One thing wrong with one batch.

    Attributes:
        kind: What sort of thing.
        source: Where the batch comes from.
        batch_index: Its position there, from 0.
        text: What is wrong, in plain words.
    """

    kind: DefectKind
    source: Source
    batch_index: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldStatistics:
    """What one tensor of a batch looks like over all batches.

    Attributes:
        name: Where it is in the batch, as `.frames`, `[0]` or `['x']`; empty for a bare tensor.
        dtype: Its type, as torch names it.
        is_float: False for integers and booleans, whose mean says nothing.
        shape: Its shape in the first batch.
        is_ragged: True if other batches have other shapes, the number of samples aside.
        low: Smallest finite value; None if there is none.
        high: Largest finite value; None likewise.
        mean: Mean of the finite values; None likewise.
        std: Their standard deviation; None likewise.
        num_nan: NaN values.
        num_inf: Infinite values.
    """

    name: str
    dtype: str
    is_float: bool
    shape: tuple[int, ...]
    is_ragged: bool
    low: float | None
    high: float | None
    mean: float | None
    std: float | None
    num_nan: int
    num_inf: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What the batches of a task look like.

    Attributes:
        num_training_batches: Training micro-batches read, the first ones of the first seed.
        num_probe_batches: Probe batches read.
        training: A row per tensor of a training batch.
        probe: The same of the probe.
        defects: What is wrong with single batches, the first of each kind.
        num_defects: How many batches have each kind of defect, those not listed included.
        hints: Fields whose values are far from what training expects, one sentence each.
        unchecked: What nobody looked at, one sentence each.
    """

    num_training_batches: int
    num_probe_batches: int
    training: tuple[FieldStatistics, ...]
    probe: tuple[FieldStatistics, ...]
    defects: tuple[Defect, ...] = ()
    num_defects: Mapping[str, int] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()

    def has(self, *kinds: DefectKind) -> bool:
        """Say whether any batch has a defect of these kinds."""
        return any(self.num_defects.get(kind.value, 0) for kind in kinds)


class BatchSieve:
    """Say what is wrong with a batch, knowing what is usual.

    Args:
        task: Its `check_batch` is asked, where it has one.
        limits: Largest absolute value that is still usual, by the name of the tensor.
        minus_inf: Tensors that hold -Inf from the first batch on: an additive mask is full of it.
    """

    def __init__(self, task: Task, limits: Mapping[str, float], minus_inf: frozenset[str]) -> None:
        self._task = task
        self._limits = limits
        self._minus_inf = minus_inf

    def faults(self, batch: Any) -> Faults:  # noqa: ANN401 - the task's own
        """Return what is wrong with a batch on the CPU; empty if nothing is."""
        broken = _broken(self._task, batch, self._minus_inf)
        return [*broken, *_outliers(_largest(batch), self._limits)]


def read_batches(
    task: Task,
    stream: Iterable[Any],
    *,
    num_batches: int,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[DataReport, BatchSieve]:
    """Look at the first training batches and the whole probe.

    Args:
        task: Its probe is read, and its `check_batch` asked.
        stream: Its training micro-batches, on the CPU.
        num_batches: How many of them to read, >= 1; fewer if that takes longer than 8 s.
        clock: Seconds from a fixed start.

    Returns:
        What was seen, and the sieve that finds such batches again.
    """
    training, seen = _read_training(task, stream, num_batches, clock)
    limits = training.limits()
    sieve = BatchSieve(task, limits, training.minus_inf)
    probe, probe_faults = _Table(), []
    for batch in task.probe():
        probe.add(batch)
        probe_faults.append(sieve.faults(batch))
    defects = _defects(
        "training", [[*broken, *_outliers(largest, limits)] for broken, largest in seen]
    )
    defects += _defects("probe", probe_faults)
    counts = {
        kind.value: len({(d.source, d.batch_index) for d in defects if d.kind is kind})
        for kind in DefectKind
    }
    report = DataReport(
        num_training_batches=training.num_batches,
        num_probe_batches=probe.num_batches,
        training=training.rows(),
        probe=probe.rows(),
        defects=tuple(
            defect
            for kind in DefectKind
            for defect in [d for d in defects if d.kind is kind][:MAX_LISTED]
        ),
        num_defects={kind: number for kind, number in counts.items() if number},
        hints=tuple(hint for row in training.rows() for hint in range_hints(row)),
        unchecked=_unchecked(task, training),
    )
    return report, sieve


def _read_training(
    task: Task, stream: Iterable[Any], num_batches: int, clock: Callable[[], float]
) -> tuple["_Table", list[tuple[Faults, dict[str, float]]]]:
    """Return the sums over the batches, and of each its faults and largest values by tensor.

    No batch is kept: some hundred of them may be more than memory holds. Which are outliers is
    known only once all were seen, and their largest values are all that takes.
    """
    table, seen, spent_s = _Table(), [], 0.0
    batches, started = iter(stream), clock()
    for batch in batches:
        spent_s += clock() - started
        table.add(batch)
        seen.append((_broken(task, batch, table.minus_inf), _largest(batch)))
        if len(seen) >= num_batches or spent_s > READ_S:
            break
        started = clock()
    return table, seen


def range_hints(row: FieldStatistics) -> list[str]:
    """Say in plain words how far a field of numbers is from a normalised input.

    Args:
        row: A field of the training batches; one of integers gives no hint.
    """
    if not row.is_float or None in {row.low, row.high, row.mean, row.std}:
        return []
    low, high, mean, std = (
        float(x) for x in (row.low, row.high, row.mean, row.std) if x is not None
    )
    odd = []
    if max(-low, high) > LARGEST_EXPECTED:
        odd.append(f"values from {low:.3g} to {high:.3g} (usual: about -5 to 5)")
    if std > WIDEST_STD or 0 < std < NARROWEST_STD:
        odd.append(f"standard deviation {std:.3g} (usual: about 1)")
    if abs(mean) > LARGEST_MEAN:
        odd.append(f"mean {mean:.3g} (usual: about 0)")
    if std == 0 and high != 0:
        odd.append(f"every value is {high:.3g}")
    if not odd:
        return []
    return [f"{row.name or 'the batch'}: {', '.join(odd)}. If it is an input, normalise it."]


def _defects(source: Source, faults: Sequence[Faults]) -> list[Defect]:
    return [
        Defect(kind=kind, source=source, batch_index=index, text=text)
        for index, of_batch in enumerate(faults)
        for kind, text in of_batch
    ]


def _unchecked(task: Task, training: "_Table") -> tuple[str, ...]:
    found = []
    if not isinstance(task, HasBatchCheck):
        found.append(
            "Whether targets fit their inputs was not checked: the task has no `check_batch`."
        )
    if not training.rows():
        found.append("No statistics: a batch holds no tensor that can be seen.")
    elif training.num_batches < MIN_BATCHES:
        found.append(
            f"Batches were not compared with each other: {training.num_batches} were read, "
            f"and {MIN_BATCHES} are needed."
        )
    return tuple(found)


class _Table:
    """Sums over batches, a row per tensor."""

    def __init__(self) -> None:
        self.num_batches = 0
        self._columns: dict[str, _Column] = {}

    def add(self, batch: Any) -> None:  # noqa: ANN401 - the task's own
        self.num_batches += 1
        for name, tensor in _named(batch):
            if name not in self._columns:
                self._columns[name] = _Column(tensor)
            self._columns[name].add(tensor)

    @property
    def minus_inf(self) -> frozenset[str]:
        return frozenset(name for name, col in self._columns.items() if col.had_minus_inf)

    def limits(self) -> dict[str, float]:
        """Return the largest absolute value that is usual, where it is known."""
        found = {}
        for name, column in self._columns.items():
            usual = median(column.largest) if len(column.largest) >= MIN_BATCHES else 0.0
            if usual > 0 and column.is_float:
                found[name] = OUTLIER_FACTOR * usual
        return found

    def rows(self) -> tuple[FieldStatistics, ...]:
        return tuple(column.row(name) for name, column in self._columns.items())


class _Column:
    """Running sums of one tensor."""

    def __init__(self, first: torch.Tensor) -> None:
        self.is_float = first.is_floating_point() or first.is_complex()
        self.dtype = str(first.dtype).removeprefix("torch.")
        self.shape = tuple(first.shape)
        self.had_minus_inf = _has_minus_inf(first)
        self.largest: list[float] = []
        self._is_ragged = False
        self._low, self._high = math.inf, -math.inf
        self._count, self._num_nan, self._num_inf = 0, 0, 0
        self._mean, self._squares = 0.0, 0.0

    def add(self, tensor: torch.Tensor) -> None:
        self._is_ragged |= tuple(tensor.shape)[1:] != self.shape[1:]
        values = _values(tensor)
        finite = values[torch.isfinite(values)]
        self._num_nan += int(torch.isnan(values).sum())
        self._num_inf += int(torch.isinf(values).sum())
        if not finite.numel():
            return
        self._low = min(self._low, float(finite.min()))
        self._high = max(self._high, float(finite.max()))
        # Around the mean so far (Chan et al. 1979): a sum of squares cancels where it is large.
        before, num_new = self._count, finite.numel()
        self._count += num_new
        centre = float(finite.mean())
        shift = centre - self._mean
        self._squares += float((finite - centre).square().sum())
        self._squares += shift * shift * before * num_new / self._count
        self._mean += shift * num_new / self._count
        self.largest.append(float(finite.abs().max()))

    def row(self, name: str) -> FieldStatistics:
        mean = self._mean if self._count else math.nan
        variance = self._squares / self._count if self._count else math.nan
        return FieldStatistics(
            name=name,
            dtype=self.dtype,
            is_float=self.is_float,
            shape=self.shape,
            is_ragged=self._is_ragged,
            low=finite_or_none(self._low),
            high=finite_or_none(self._high),
            mean=finite_or_none(mean),
            std=math.sqrt(variance) if math.isfinite(variance) else None,
            num_nan=self._num_nan,
            num_inf=self._num_inf,
        )


def _named(batch: Any) -> Iterable[tuple[str, torch.Tensor]]:  # noqa: ANN401 - the task's own
    return tensors(batch, path="")


def _values(tensor: torch.Tensor) -> torch.Tensor:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return plain.detach().to("cpu", torch.float64)


def _broken(task: Task, batch: Any, minus_inf: frozenset[str]) -> Faults:  # noqa: ANN401
    """Return what is wrong with a batch, whatever the others look like."""
    found: Faults = []
    for name, tensor in _named(batch):
        text = _nonfinite(name, tensor, name in minus_inf)
        if text:
            found.append((DefectKind.NONFINITE, text))
    if isinstance(task, HasBatchCheck):
        found += [(DefectKind.MISFIT, str(text)) for text in task.check_batch(batch)]
    return found


def _outliers(largest: Mapping[str, float], limits: Mapping[str, float]) -> Faults:
    """Return what is far larger in a batch than in the others."""
    usual = f"over {OUTLIER_FACTOR:g} times the usual largest value"
    return [
        (DefectKind.OUTLIER, f"{name or 'it'} reaches {value:.3g}, {usual}")
        for name, value in largest.items()
        if name in limits and value > limits[name]
    ]


def _largest(batch: Any) -> dict[str, float]:  # noqa: ANN401 - the task's own
    """Return the largest finite absolute value of each tensor that has one."""
    found = {}
    for name, tensor in _named(batch):
        values = _values(tensor)
        finite = values[torch.isfinite(values)]
        if finite.numel():
            found[name] = float(finite.abs().max())
    return found


def _has_minus_inf(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isneginf(tensor).any())


def _nonfinite(name: str, tensor: torch.Tensor, is_mask: bool) -> str:
    values = _values(tensor)
    num_nan, num_plus = int(torch.isnan(values).sum()), int(torch.isposinf(values).sum())
    num_minus = 0 if is_mask else int(torch.isneginf(values).sum())
    if not (num_nan or num_plus or num_minus):
        return ""
    words = [f"{num_nan:,} NaN"] if num_nan else []
    words += [f"{num_plus + num_minus:,} Inf"] if num_plus + num_minus else []
    return f"{' and '.join(words)} in {name or 'the batch'} ({values.numel():,} values)"
