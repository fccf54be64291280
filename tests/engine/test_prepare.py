"""What settings change in a model before its first step."""

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.engine.half_weights import keep_no_half_precision
from stability_search.engine.optim import build_optimizer, default_groups
from stability_search.engine.prepare import (
    check_one_device,
    prepare_model,
)
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings


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
    with pytest.raises(
        UsageError, match=r"init_gain: a gain of 2 needs a trainable weight matrix"
    ):
        prepare_model(nn.LayerNorm(2), settings(init_gain=2.0))


# -- half-precision parameters ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trainable_half_precision_becomes_fp32_and_frozen_stays(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.BatchNorm1d(64)).to(dtype)
    model[1].requires_grad_(requires_grad=False)
    before = [parameter.float() for parameter in model.parameters()]

    notes = prepare_model(model, settings(precision="fp16"))

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
        "0.0 MiB more, and 0.0 MiB more for their gradients and the state of adamw"
    )
    frozen = (
        f"2 frozen parameters and buffers stay in {name}; measuring is always done in fp32, and "
        "fp32 copies of them take 0.0 MiB more meanwhile"
    )
    assert notes == (expected, frozen)


@pytest.mark.parametrize(
    ("more", "num_states"),
    [
        ({"optimizer": "adamw"}, 2),
        ({"optimizer": "adam"}, 2),
        ({"optimizer": "sgd"}, 0),
        ({"optimizer": "sgd", "momentum": 0.9}, 1),
    ],
)
def test_the_note_says_what_the_master_weights_cost(
    more: dict[str, object], num_states: int
) -> None:
    def mib(tensors: Iterable[torch.Tensor]) -> float:
        return sum(t.numel() * t.element_size() for t in tensors if t.dim() > 0) / 2**20

    def states(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [t for state in optimizer.state.values() for t in state.values() if t is not None]

    before = nn.Linear(1024, 1024, bias=False).half()
    plain = build_optimizer(default_groups(before), settings(**more))
    before.weight.grad = torch.zeros_like(before.weight)
    plain.step()
    model = nn.Linear(1024, 1024, bias=False).half()
    with GuardedEngine(model, settings(precision="fp16", init_scale=1.0, **more)) as engine:
        record = engine.step([torch.ones(2, 1024)], lambda m, x: m(x).float().square().mean())
        (note,) = engine.notes
    assert record.is_applied
    weights = mib(model.parameters()) - mib(before.parameters())
    gradients = mib([model.weight.grad]) - mib([before.weight.grad])
    moments = mib(states(engine.optimizer)) - mib(states(plain))
    assert (weights, gradients, moments) == (2.0, 2.0, 2.0 * num_states)
    assert f"{weights:.1f} MiB more, and {gradients + moments:.1f} MiB more for" in note


def test_ties_survive_master_weights_and_are_multiplied_once() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)).half()
    model[1].weight = model[0].weight
    before = model[0].weight.detach().float()
    (note,) = prepare_model(model, settings(init_gain=3.0))
    assert model[1].weight is model[0].weight
    assert torch.equal(model[0].weight, 3.0 * before)
    assert note.startswith("1 trainable parameters")


def test_fp32_keeps_frozen_weights_in_fp32_too_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(512, 1024, bias=False).half(), nn.Linear(1024, 1))
    model[0].requires_grad_(requires_grad=False)
    (note,) = prepare_model(model, settings(precision="fp32"))
    assert model[0].weight.dtype == torch.float32
    assert note == (
        "1 frozen parameters and buffers were stored in float16; fp32 cannot be computed with "
        "them, so they are kept in fp32, 1.0 MiB more"
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)])
def test_frozen_norms_are_widened_since_autocast_leaves_them_alone(
    norm: nn.Module, precision: str
) -> None:
    def net() -> nn.Module:
        frozen = copy.deepcopy(norm).half().requires_grad_(requires_grad=False)
        return nn.Sequential(frozen, nn.Linear(4, 1))

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).float().square().mean()

    with GuardedEngine(net(), settings(precision=precision)) as engine:
        assert engine.step([torch.randn(3, 4)], loss).is_loss_finite
    with pytest.raises(RuntimeError, match="mixed dtype"), torch.autocast("cpu"):  # the twin
        net()(torch.randn(3, 4))


def test_a_reference_keeps_no_half_precision_at_all() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    model[0].requires_grad_(requires_grad=False)
    assert keep_no_half_precision(model) is model
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}
    double = nn.Linear(2, 2).double()
    assert keep_no_half_precision(double).weight.dtype == torch.float64


# -- models that nothing could train ----------------------------------------------------------


def sparse() -> nn.Module:
    return nn.ModuleDict({"words": nn.Embedding(5, 2, sparse=True)})


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        (
            nn.LazyLinear(2),
            {},
            r"must have a shape, but weight has none yet .*Call the model once",
        ),
        (nn.Linear(2, 2, device="meta"), {}, "weight is on the meta device. Build the model"),
        (sparse(), {}, "gradients must be dense, but words is an embedding with sparse=True"),
        (
            nn.Linear(2, 2).double(),
            {"precision": "fp16"},
            "fp16 is computed from fp32 weights, but every weight matrix of the model is float64",
        ),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    model: nn.Module, more: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        prepare_model(model, settings(**more))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_script_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(UsageError, match="made of Python modules, but 1 is a ScriptModule"):
        prepare_model(model, settings())


def test_a_frozen_sparse_embedding_and_a_double_model_in_fp32_are_fine() -> None:
    frozen = nn.ModuleDict({"words": sparse().requires_grad_(requires_grad=False)})
    assert prepare_model(frozen, settings()) == ()
    assert prepare_model(nn.Linear(2, 2).double(), settings()) == ()


def test_parameters_on_two_devices_are_refused() -> None:
    spread = [torch.zeros(1), torch.zeros(1, device="meta")]
    with pytest.raises(UsageError, match="must be on one device, but they are on cpu, meta"):
        check_one_device(spread)
    check_one_device(spread[:1])


@pytest.mark.parametrize(
    "more",
    [{"norm": "group"}, {"gradient_checkpointing": True}, {"init_gain": 2.0, "norm": "group"}],
)
def test_a_refused_model_is_as_it_was(more: dict[str, object]) -> None:
    model = nn.Linear(2, 2).half()
    before = model.weight.clone()
    with pytest.raises(UsageError, match="the model has"):
        prepare_model(model, settings(**more))
    assert torch.equal(model.weight, before)
    assert model.weight.dtype == torch.float16


def test_groups_of_one_value_are_refused_when_they_are_met() -> None:
    """A value normalised by itself is zero, so the layers below would learn nothing."""

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with GuardedEngine(model, settings(norm="group")) as engine:
        for _ in range(2):
            with pytest.raises(UsageError, match="1 has 8 channels and 8 groups"):
                engine.step([torch.randn(4, 3)], loss)
    assert nn.GroupNorm(8, 8)(torch.randn(4, 8)).abs().max() < 1e-3  # why

    for model, x in (
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)), torch.randn(4, 3, 5)),
        (nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16)), torch.randn(4, 3)),
    ):
        with GuardedEngine(model, settings(norm="group")) as engine:
            assert engine.step([x], loss).label.value == "ok"
        assert not model[1]._forward_pre_hooks  # noqa: SLF001 - it looks once
