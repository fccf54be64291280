"""What a skipped step undoes."""

import torch
from torch import nn

from stability_search.engine.rollback import Rollback

CPU = torch.device("cpu")


class Stateful(nn.Module):
    """Buffers changed in every way a module may change them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("assigned", torch.zeros(2))
        self.register_buffer("late", None)
        self.register_buffer("low", torch.ones(1, dtype=torch.bfloat16), persistent=False)

    def disturb(self) -> None:
        self.norm(torch.full((4, 2), float("inf")))
        self.assigned = self.assigned + 1  # a new tensor, not a changed one
        self.late = torch.ones(3)
        self.low.fill_(float("nan"))


def contents(model: nn.Module) -> dict[str, list[float]]:
    return {name: buffer.flatten().tolist() for name, buffer in model.named_buffers()}


def test_buffers_come_back_however_they_were_changed() -> None:
    model = Stateful()
    before = contents(model)
    statistics = model.norm.running_mean
    rollback = Rollback(model, CPU)
    for _ in range(2):
        rollback.mark()
        model.disturb()
        assert contents(model) != before
        rollback.restore_buffers()
        assert contents(model) == before
        assert model.late is None
    assert model.norm.running_mean is statistics


def test_a_mark_is_of_its_own_time() -> None:
    model = Stateful()
    rollback = Rollback(model, CPU)
    rollback.mark()
    model.late = torch.full((2,), 7.0)
    model.assigned = torch.full((5,), 3.0)
    rollback.mark()
    model.disturb()
    rollback.restore_buffers()
    assert (model.late.tolist(), model.assigned.tolist()) == ([7.0] * 2, [3.0] * 5)


def test_random_state_comes_back_to_the_window_or_to_a_micro_batch() -> None:
    rollback = Rollback(nn.Linear(1, 1), CPU)
    rollback.mark()
    first = torch.rand(1)
    rollback.mark_micro_batch(1, is_first=False)
    second = torch.rand(1)

    rollback.restore_random_state()
    assert torch.equal(torch.rand(1), first)
    rollback.restore_random_state(1)
    assert torch.equal(torch.rand(1), second)
    rollback.restore_random_state(5)  # never marked: the window's
    assert torch.equal(torch.rand(1), first)


def test_a_model_without_buffers_has_nothing_to_undo() -> None:
    model = nn.Linear(1, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rollback = Rollback(model, CPU)
    rollback.mark()
    rollback.restore_buffers()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_buffer_resized_in_place_is_remembered_all_the_same() -> None:
    model = nn.Module()
    model.register_buffer("seen", torch.zeros(2))
    rollback = Rollback(model, CPU)
    rollback.mark()
    model.seen.resize_(3).copy_(torch.tensor([1.0, 2.0, 3.0]))
    rollback.mark()
    model.seen.zero_()
    rollback.restore_buffers()
    assert model.seen.tolist() == [1.0, 2.0, 3.0]
