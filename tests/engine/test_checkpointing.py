"""Gradient checkpointing changes no number, counts a batch once, and is undone."""

import pytest
import torch
from torch import nn

from stability_search.engine.checkpointing import checkpoint_blocks
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings


def settings(**more: object) -> EngineSettings:
    return EngineSettings(learning_rate=0.1, **more)


class Counting(nn.Module):
    """A block that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.num_runs = 0

    def forward(self, x: torch.Tensor, *, times: float) -> torch.Tensor:
        self.num_runs += 1
        return self.inner(x) * times


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Counting(), Counting()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, times=2.0)
        return x.square().mean()


def run(*, is_checkpointed: bool) -> tuple[Stack, float]:
    torch.manual_seed(3)
    model = Stack()
    if is_checkpointed:
        checkpoint_blocks(model)
    torch.manual_seed(4)
    loss = model(torch.randn(6, 3))
    loss.backward()
    return model, loss.item()


def test_checkpointing_recomputes_each_block_and_changes_no_number() -> None:
    plain, loss = run(is_checkpointed=False)
    ours, same_loss = run(is_checkpointed=True)
    assert [block.num_runs for block in plain.blocks] == [1, 1]
    assert [block.num_runs for block in ours.blocks] == [2, 2]
    assert same_loss == loss
    for one, other in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_batch_norm_counts_each_batch_once() -> None:
    plain, _ = run(is_checkpointed=False)
    ours, _ = run(is_checkpointed=True)
    assert ours.blocks[0].inner[1].num_batches_tracked == 1
    assert all(map(torch.equal, plain.buffers(), ours.buffers()))


def test_without_gradients_nothing_is_recomputed_and_undoing_leaves_nothing() -> None:
    model = Stack()
    undo = checkpoint_blocks(model)
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert model.blocks[0].num_runs == 1
    undo()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_only_the_outermost_blocks_are_wrapped() -> None:
    stages = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.ReLU()), nn.ReLU()]), nn.ReLU()])
    model = nn.ModuleDict({"stem": nn.Sequential(nn.Sequential(nn.ReLU())), "stages": stages})
    checkpoint_blocks(model)
    wrapped = [name for name, m in model.named_modules() if "forward" in m.__dict__]
    assert wrapped == ["stem.0", "stages.0.0", "stages.0.1", "stages.1"]


def test_a_model_that_checkpoints_itself_is_asked_to() -> None:
    class Own(nn.Linear):
        is_on = False

        def gradient_checkpointing_enable(self) -> None:
            self.is_on = True

        def gradient_checkpointing_disable(self) -> None:
            self.is_on = False

    model = Own(1, 1)
    undo = checkpoint_blocks(model)
    assert model.is_on
    undo()
    assert not model.is_on


class Checkpointing(nn.Module):
    """A part that checkpoints itself, as Hugging Face models do; it leaves a hook behind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.options: dict[str, bool] | None = None

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, bool] | None = None
    ) -> None:
        self.options = gradient_checkpointing_kwargs
        self.stem.register_forward_hook(lambda *_: None)

    def gradient_checkpointing_disable(self) -> None:
        self.options = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.options is None:
            return self.body(x)
        return torch.utils.checkpoint.checkpoint(self.body, x, **self.options)


def test_a_part_that_checkpoints_itself_does_so_and_batch_norm_still_counts_once() -> None:
    model = nn.ModuleDict({"lm": Checkpointing(), "head": nn.Sequential(nn.Linear(3, 1))})
    model["lm"].stem.requires_grad_(requires_grad=False)
    undo = checkpoint_blocks(model)
    assert model["lm"].options == {"use_reentrant": False}  # the other loses gradients here
    wrapped = [name for name, m in model.named_modules() if "forward" in m.__dict__]
    assert wrapped == ["lm.body.1", "head.0"]
    model["head"](model["lm"](torch.randn(4, 3))).sum().backward()
    assert model["lm"].body[1].num_batches_tracked == 1
    assert model["lm"].body[0].weight.grad is not None
    model["lm"].body[0].register_forward_hook(lambda *_: None)  # somebody else's
    undo()
    assert model["lm"].options is None
    assert not model["lm"].stem._forward_hooks  # noqa: SLF001 - what this test is about
    assert model["lm"].body[0]._forward_hooks  # noqa: SLF001 - as above


def test_without_our_care_batch_norm_would_count_twice() -> None:
    part = Checkpointing()
    part.gradient_checkpointing_enable({"use_reentrant": False})
    part(torch.randn(4, 3)).sum().backward()
    assert part.body[1].num_batches_tracked == 2


def test_a_block_that_changes_its_input_is_refused_and_one_that_is_in_place_is_left_alone() -> (
    None
):
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Hardswish(inplace=True), nn.Linear(3, 1))
    free = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    undo = checkpoint_blocks(model)
    assert all(map(torch.equal, free, torch.autograd.grad(model(x).sum(), model.parameters())))
    undo()

    block = nn.Sequential(nn.Hardswish(inplace=True), nn.Linear(3, 1))
    model = nn.Sequential(nn.Linear(3, 3), block)
    checkpoint_blocks(model)
    with pytest.raises(UsageError, match=r"but 1 \(Sequential\) changes it in place"):
        model(x)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no nn.ModuleList or nn.Sequential of blocks"):
        checkpoint_blocks(nn.Linear(1, 1))
