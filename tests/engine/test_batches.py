"""Batches of any shape."""

from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from stability_search.engine.batches import BatchInspector, move, tensors

META = torch.device("meta")  # a device that shows whether a tensor was moved
NAN, INF = float("nan"), float("inf")


class Named(NamedTuple):
    x: torch.Tensor
    y: Any


@dataclass
class Open:
    x: torch.Tensor
    note: str = "kept"
    made: int = field(init=False, default=3)


@dataclass(frozen=True, slots=True)
class Closed:
    x: torch.Tensor


class Own:
    """A batch with a `to` of its own."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> "Own":
        return Own(self.x.to(device))


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda x: x, "batch"),
        (lambda x: (x, 1), "batch[0]"),
        (lambda x: ["a", [x]], "batch[1][0]"),
        (lambda x: {"frames": x}, "batch['frames']"),
        (lambda x: OrderedDict(frames=x), "batch['frames']"),
        (lambda x: defaultdict(list, frames=x), "batch['frames']"),
        (lambda x: UserDict(frames=x), "batch['frames']"),
        (lambda x: MappingProxyType({"frames": x}), "batch['frames']"),
        (lambda x: Named(x=None, y=x), "batch[1]"),
        (Open, "batch.x"),
        (Closed, "batch.x"),
        (Own, "batch.x"),
        (lambda x: {"rows": [Open(x)]}, "batch['rows'][0].x"),
    ],
)
def test_every_tensor_is_found_and_moved(make: Any, path: str) -> None:
    batch = make(torch.zeros(2))
    assert [where for where, _ in tensors(batch)] == [path]

    moved = move(batch, META)

    assert type(moved) is type(batch)
    assert [tensor.device.type for _, tensor in tensors(moved)] == ["meta"]
    assert [tensor.device.type for _, tensor in tensors(batch)] == ["cpu"]


def test_what_holds_no_tensor_is_passed_on() -> None:
    for batch in ("text", 3, None, [1, "a"], {"a": None}):
        assert list(tensors(batch)) == []
        assert move(batch, META) == batch


def test_a_dictionary_keeps_its_default_and_a_dataclass_its_other_fields() -> None:
    moved = move(defaultdict(list, x=torch.zeros(1)), META)
    assert moved["absent"] == []
    assert move(Open(torch.zeros(1), note="mine"), META).note == "mine"


def test_a_packed_sequence_moves_itself() -> None:
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = move(packed, torch.device("cpu"))
    assert isinstance(moved, PackedSequence)
    assert torch.equal(moved.batch_sizes, packed.batch_sizes)


def test_a_batch_that_holds_itself_ends() -> None:
    batch: dict[str, Any] = {"x": torch.zeros(1)}
    batch["self"] = batch
    own = Own(torch.zeros(1))
    own.self = own  # type: ignore[attr-defined]
    own.module = torch  # type: ignore[attr-defined]
    assert [path for path, _ in tensors(batch)] == ["batch['x']"]
    assert [path for path, _ in tensors(own)] == ["batch.x"]


@pytest.mark.parametrize(
    ("value", "what"),
    [(NAN, "NaN in batch['x']"), (INF, "Inf in batch['x']"), (-INF, "-Inf in batch['x']")],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_fault_names_its_field(value: float, what: str, dtype: torch.dtype) -> None:
    inspector = BatchInspector({"x": torch.zeros(3, dtype=dtype)})
    assert inspector.fault({"x": torch.ones(3, dtype=dtype), "y": torch.tensor([1])}) == ""
    assert inspector.fault({"x": torch.tensor([0.0, value, 1.0], dtype=dtype)}) == what


def test_minus_infinity_is_a_fault_only_where_the_first_batch_had_none() -> None:
    mask = torch.tensor([0.0, -INF])
    inspector = BatchInspector({"mask": mask, "x": torch.zeros(2)})
    assert inspector.fault({"mask": mask, "x": torch.zeros(2)}) == ""
    assert inspector.fault({"mask": mask, "x": mask}) == "-Inf in batch['x']"
    assert inspector.fault({"mask": torch.tensor([0.0, NAN])}) == "NaN in batch['mask']"
    assert inspector.fault({"mask": torch.tensor([0.0, INF])}) == "Inf in batch['mask']"

    again = BatchInspector.from_state_dict(inspector.state_dict())
    assert again.fault({"mask": mask, "x": torch.zeros(2)}) == ""
    assert again.fault({"mask": mask, "x": mask}) == "-Inf in batch['x']"


def test_complex_numbers_are_inspected_too() -> None:
    inspector = BatchInspector(torch.zeros(1, dtype=torch.complex64))
    assert inspector.fault(torch.tensor([complex(0, NAN)])) == "NaN or Inf in batch"
    assert inspector.fault(torch.tensor([complex(0, 1)])) == ""
