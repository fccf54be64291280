"""Two tensors have one fingerprint exactly if type, shape and every bit of them are equal."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from stability_search.testing import check_task
from stability_search.testing.fingerprint import fingerprint
from tests.testing.sound_task import Sound

# Torch's own words on sparse tensors, said when a test makes one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

Make = Callable[[], Tensor]
ROWS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])


def coo(*values: float) -> Tensor:
    """Return a sparse 2 x 3 matrix with its first entry given in as many parts as there are."""
    indices = torch.zeros(2, len(values), dtype=torch.int64)
    return torch.sparse_coo_tensor(indices, torch.tensor(values), (2, 3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: torch.tensor([1 + 2j]), lambda: torch.tensor([1 + 3j])),
        (lambda: torch.tensor([1 + 2j]), lambda: torch.tensor([1 + 2j]).conj()),
        (lambda: torch.tensor([2**53]), lambda: torch.tensor([2**53 + 1])),
        (lambda: torch.tensor([1, 2]), lambda: torch.tensor([1.0, 2.0])),
        (lambda: torch.ones(2, dtype=torch.bfloat16), lambda: torch.ones(2)),
        (
            lambda: torch.tensor([1.0], dtype=torch.bfloat16),
            lambda: torch.tensor([1.0078125], dtype=torch.bfloat16),
        ),
        (lambda: torch.zeros(0, 2), lambda: torch.zeros(2, 0)),
        (lambda: torch.zeros(2, 3), lambda: torch.zeros(3, 2)),
        (ROWS.to_sparse, (2 * ROWS).to_sparse),
        (ROWS.to_sparse, lambda: ROWS.flip(1).to_sparse()),
        (ROWS.to_sparse, lambda: ROWS),
        (ROWS.to_sparse_csr, lambda: ROWS.flip(1).to_sparse_csr()),
        (ROWS.to_sparse_csc, lambda: ROWS.flip(0).to_sparse_csc()),
    ],
    ids=[
        "imaginary part",
        "conjugate",
        "large integers",
        "type",
        "bf16 and fp32",
        "last bit of bf16",
        "empty",
        "shape",
        "values of a sparse one",
        "places of a sparse one",
        "sparse and dense",
        "places in rows",
        "places in columns",
    ],
)
def test_what_differs_has_another_fingerprint(one: Make, other: Make) -> None:
    assert fingerprint(one()) != fingerprint(other())
    for make in (one, other):
        assert fingerprint(make()) == fingerprint(make().clone())


def test_equal_content_in_another_layout_of_memory_is_the_same() -> None:
    assert fingerprint(ROWS.t().contiguous().t()) == fingerprint(ROWS)
    assert fingerprint(torch.ones(1).expand(4)) == fingerprint(torch.ones(4))
    assert fingerprint(torch.tensor([1 + 2j]).conj()) == fingerprint(torch.tensor([1 - 2j]))
    assert fingerprint(coo(1.0, 2.0)) == fingerprint(coo(3.0).coalesce())


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.complex64]
)
def test_every_type_of_number_has_a_fingerprint(dtype: torch.dtype) -> None:
    some, none = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    assert fingerprint(some) == fingerprint(some.clone()) != fingerprint(none)
    held = some.requires_grad_(dtype.is_floating_point or dtype.is_complex)
    assert fingerprint(held) == fingerprint(some)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda inputs: inputs * 1j])
def test_a_task_with_sparse_or_complex_batches_can_be_checked(
    change: Callable[[Tensor], Tensor],
) -> None:
    class Task(Sound):
        def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
            for batch in super().batches(batch_size, generator):
                yield {**batch, "more": change(batch["inputs"])}

    class Unsound(Task):
        def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Any]:
            for batch in super().batches(batch_size, generator):
                yield {**batch, "more": change(torch.rand(batch_size, 3))}

    assert check_task(Task()) == ()
    assert "global random state" in check_task(Unsound())[0]
