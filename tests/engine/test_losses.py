"""What counts as a loss, and what as a numerical failure."""

import pytest
import torch

from stability_search.engine.losses import is_out_of_memory, mean_terms, total_loss


def test_named_terms_are_summed_and_a_plain_loss_has_none() -> None:
    loss, terms = total_loss({"box": torch.tensor(1.5), "cls": torch.tensor([2.0])})
    assert (loss.item(), loss.shape, list(terms)) == (3.5, (), ["box", "cls"])
    loss, terms = total_loss(torch.tensor([[4.0]], dtype=torch.float16))
    assert (loss.item(), loss.dtype, loss.shape, terms) == (4.0, torch.float32, (), {})


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.ones(3), r"shape \(3,\)"),
        (1.0, "float"),
        (None, "NoneType"),
        ({"box": torch.ones(2)}, r"shape \(2,\)"),
        ({"box": 1.0}, "float"),
        ({}, r"\{\}"),
    ],
)
def test_anything_else_is_refused(result: object, got: str) -> None:
    with pytest.raises(ValueError, match=f"must be a 0-d tensor or a dict of them, but got {got}"):
        total_loss(result)  # type: ignore[arg-type]


def test_terms_are_averaged_and_none_where_not_finite() -> None:
    rows = {0: {"box": 1.0, "cls": 2.0}, 2: {"box": float("nan"), "cls": 4.0}}
    assert mean_terms(rows) == {"box": None, "cls": 3.0}
    assert mean_terms({}) == {}


def test_out_of_memory_is_recognised_on_the_cpu_too() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        torch.empty(2**50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
