"""What settings change in a model before its first step."""

import math

import pytest
import torch
from torch import nn

from stability_search.engine.prepare import (
    checkpoint_blocks,
    keep_no_half_precision,
    prepare_model,
    state_fault,
    state_norm,
)
from stability_search.errors import UsageError
from stability_search.settings import EngineSettings


def settings(**more: object) -> EngineSettings:
    return EngineSettings(learning_rate=0.1, **more)


def test_defaults_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert prepare_model(model, settings()) == ()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# -- norm: group -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "groups"), [(16, 8), (12, 6), (7, 7), (13, 1), (20, 5), (8, 8)]
)
def test_batch_norm_becomes_group_norm_with_eight_groups_or_the_next_divisor(
    channels: int, groups: int
) -> None:
    model = nn.Sequential(nn.Conv1d(1, channels, 1), nn.BatchNorm1d(channels, eps=0.5))
    weight = model[1].weight

    prepare_model(model, settings(norm="group"))

    assert isinstance(model[1], nn.GroupNorm)
    assert (model[1].num_groups, model[1].eps) == (groups, 0.5)
    assert model[1].weight is weight


def test_norms_are_replaced_at_any_depth_and_keep_mode_and_ties() -> None:
    shared = nn.BatchNorm2d(4, affine=False).eval()
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.ModuleList([shared, shared])})
    prepare_model(model, settings(norm="group"))
    assert isinstance(model["a"][0], nn.GroupNorm)
    assert model["b"][0] is model["b"][1] is model["a"][0]
    assert not model["a"][0].training
    assert model["a"][0].weight is None


def test_group_norm_without_a_batch_norm_is_refused() -> None:
    with pytest.raises(UsageError, match="`group` replaces BatchNorm, but the model has none"):
        prepare_model(nn.Linear(2, 2), settings(norm="group"))


# -- init_gain -------------------------------------------------------------------------------


def test_the_gain_multiplies_trainable_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad_(requires_grad=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare_model(model, settings(init_gain=0.5))
    factors = {name: 0.5 if name == "0.weight" else 1.0 for name in before}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * factors[name])


def test_the_gain_multiplies_what_is_named_once_even_by_two_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight  # tied
    before = model[0].weight.clone()
    prepare_model(model, settings(init_gain=3.0), init_gain_names=["1.weight", "0.weight"])
    assert torch.equal(model[0].weight, before * 3.0)


def test_unknown_names_and_nothing_to_multiply_are_refused() -> None:
    with pytest.raises(UsageError, match="but got absent, gone"):
        prepare_model(
            nn.Linear(2, 2), settings(init_gain=2.0), init_gain_names=["weight", "gone", "absent"]
        )
    with pytest.raises(UsageError, match="no weight matrix to multiply"):
        prepare_model(nn.LayerNorm(2), settings(init_gain=2.0))


# -- half-precision parameters ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainable_half_precision_becomes_fp32_and_frozen_stays(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.BatchNorm1d(64)).to(dtype)
    model[1].requires_grad_(requires_grad=False)
    before = [parameter.float() for parameter in model.parameters()]

    notes = prepare_model(model, settings())

    assert [p.dtype for p in model.parameters()] == [
        *(torch.float32, torch.float32, dtype, dtype, torch.float32, torch.float32)
    ]
    assert model[2].running_mean.dtype == torch.float32
    assert all(
        torch.equal(p.float(), was) for p, was in zip(model.parameters(), before, strict=True)
    )
    name = str(dtype).removeprefix("torch.")
    expected = (
        f"4 trainable parameters were stored in {name}; they are kept as fp32 master weights, "
        "0.0 MiB more (frozen ones stay as they are)"
    )
    assert notes == (expected,)


def test_a_reference_keeps_no_half_precision_at_all() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    model[0].requires_grad_(requires_grad=False)
    assert keep_no_half_precision(model) is model
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    double = nn.Linear(2, 2).double()
    assert keep_no_half_precision(double).weight.dtype == torch.float64


# -- gradient checkpointing ------------------------------------------------------------------


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


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no nn.ModuleList or nn.Sequential of blocks"):
        checkpoint_blocks(nn.Linear(1, 1))


# -- finiteness ------------------------------------------------------------------------------


def trained(optimizer: str = "adamw") -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([[4.0]]))]
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    made = kind(parameters, lr=0.0)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    return parameters, made


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_finite_states_have_a_finite_norm(optimizer: str) -> None:
    parameters, made = trained(optimizer)
    assert [state_norm(parameters, made, turn).item() for turn in range(5)] == [5.0] * 5
    assert state_fault(parameters, made) == ""


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_parameter_is_found(value: float) -> None:
    parameters, made = trained()
    parameters[1].data.fill_(value)
    for turn in range(4):
        assert not math.isfinite(state_norm(parameters, made, turn).item())
    assert state_fault(parameters, made) == "a parameter became NaN or Inf"


def test_a_broken_second_moment_is_found_though_it_moves_no_parameter() -> None:
    parameters, made = trained()
    made.state[parameters[0]]["exp_avg_sq"].fill_(math.inf)
    found = [math.isfinite(state_norm(parameters, made, turn).item()) for turn in range(8)]
    assert found == [False, True, True, True] * 2  # each is read at every fourth turn
    assert state_fault(parameters, made) == "an optimizer state became NaN or Inf"


def test_huge_parameters_are_finite_though_their_squares_are_not() -> None:
    parameters, made = trained()
    parameters[0].data.fill_(3e38)
    assert state_norm(parameters, made, 0).item() == math.inf
    assert state_fault(parameters, made) == ""
