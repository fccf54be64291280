"""Optimizers as the settings name them, and the rate of each update."""

import math

import pytest
import torch
from torch import nn

from stability_search.engine.optim import (
    build_optimizer,
    checked_groups,
    default_groups,
    learning_rate_at,
)
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings


def settings(**more: object) -> EngineSettings:
    return EngineSettings(**{"learning_rate": 0.25, **more})


@pytest.mark.parametrize(
    ("name", "kind", "decay"),
    [
        ("adamw", torch.optim.AdamW, 0.01),
        ("adam", torch.optim.Adam, 0.0),
        ("sgd", torch.optim.SGD, 0.0),
    ],
)
def test_defaults_are_pytorchs_own(name: str, kind: type, decay: float) -> None:
    model = nn.Linear(2, 1)
    ours = build_optimizer(default_groups(model), settings(optimizer=name))
    theirs = kind(model.parameters(), lr=0.25)

    assert type(ours) is kind
    assert ours.defaults["weight_decay"] == decay
    assert {k: v for k, v in ours.defaults.items() if k != "fused"} == {
        k: v for k, v in theirs.defaults.items() if k != "fused"
    }
    assert ours.defaults["fused"]


def test_settings_reach_the_optimizer() -> None:
    chosen = settings(optimizer="adam", beta1=0.5, beta2=0.6, eps=1e-4, weight_decay=0.3)
    group = build_optimizer(default_groups(nn.Linear(2, 1)), chosen).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.5, 0.6), 1e-4, 0.3)
    group = build_optimizer(
        default_groups(nn.Linear(2, 1)), settings(optimizer="sgd", momentum=0.7)
    ).param_groups[0]
    assert group["momentum"] == 0.7


def test_groups_keep_their_own_values_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].bias.requires_grad_(requires_grad=False)
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.5},
        {"params": model[1].weight},
        {"params": (p for p in [model[1].bias])},
        {"params": []},
    ]
    built = build_optimizer(groups, settings())
    assert [group["weight_decay"] for group in built.param_groups] == [0.5, 0.01, 0.01]
    kept = [parameter for group in built.param_groups for parameter in group["params"]]
    wanted = [model[0].weight, model[1].weight, model[1].bias]
    assert all(ours is theirs for ours, theirs in zip(kept, wanted, strict=True))


def test_parameters_may_have_names() -> None:
    model = nn.Linear(2, 1)
    groups = [{"params": model.named_parameters()}]
    assert build_optimizer(groups, settings()).param_groups[0]["params"][0] is model.weight


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": 1.0}, "a group must not set `lr`"),
        ({"lr_mult": 2.0}, "may set amsgrad, .*weight_decay, but one sets lr_mult. Leave it out"),
        ({"fused": False}, "but one sets fused"),
    ],
)
def test_what_a_group_may_not_set_is_refused(group: dict[str, object], message: str) -> None:
    groups = [{"params": nn.Linear(2, 1).parameters(), **group}]
    with pytest.raises(UsageError, match=message):
        build_optimizer(groups, settings())


def test_groups_that_are_none_are_refused_and_bare_parameters_are_one() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(UsageError, match="a group must have `params`, but one has weights"):
        build_optimizer([{"weights": model.parameters()}], settings())
    assert len(build_optimizer(model.parameters(), settings()).param_groups[0]["params"]) == 2


@pytest.mark.parametrize("is_one_group", [True, False])
def test_a_parameter_that_stands_there_twice_is_refused(is_one_group: bool) -> None:
    model = nn.Linear(2, 1)
    groups = [{"params": [model.weight, model.weight]}]
    if not is_one_group:
        groups = [{"params": [model.weight]}, {"params": [model.weight, model.bias]}]
    with pytest.raises(UsageError, match=r"one of shape \(1, 2\) stands there twice"):
        build_optimizer(groups, settings())


def test_parameters_of_another_model_are_refused() -> None:
    """A group made from another instance would train nothing."""
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    with pytest.raises(UsageError, match=r"must be one of the model, but one of shape \(1, 2\)"):
        checked_groups(default_groups(other), model)
    assert checked_groups(default_groups(model), model)


def test_names_in_place_of_parameters_are_refused() -> None:
    with pytest.raises(UsageError, match="must be tensors, but one is 'weight'"):
        build_optimizer([{"params": ["weight"]}], settings())


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_what_torch_refuses_is_said_in_its_words(name: str) -> None:
    doubled = nn.Linear(2, 1).weight * 2
    with pytest.raises(UsageError, match=r"torch.optim must accept them, but said: .*non-leaf"):
        build_optimizer([{"params": [doubled]}], settings(optimizer=name))


def test_nothing_to_train_is_refused() -> None:
    model = nn.Linear(2, 1).requires_grad_(requires_grad=False)
    with pytest.raises(UsageError, match="at least one parameter must be trainable"):
        build_optimizer(default_groups(model), settings())


def test_complex_parameters_are_trained_unfused() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert not build_optimizer([{"params": [weight]}], settings()).defaults["fused"]


def rates(count: int, **more: object) -> list[float]:
    return [learning_rate_at(k, settings(**more)) for k in range(count)]


def test_a_constant_rate_is_the_peak() -> None:
    assert rates(3, num_planned_steps=2) == [0.25] * 3


def test_warm_up_rises_to_the_peak() -> None:
    assert rates(6, warmup_steps=4) == [0.0625, 0.125, 0.1875, 0.25, 0.25, 0.25]


def test_a_schedule_reaches_zero_just_after_the_last_planned_step() -> None:
    assert rates(6, schedule="linear", num_planned_steps=4) == [0.25, 0.1875, 0.125, 0.0625, 0, 0]
    cosine = rates(6, schedule="cosine", num_planned_steps=4)
    assert cosine == [0.125 * (1 + math.cos(math.pi * k / 4)) for k in (0, 1, 2, 3, 4, 4)]
    assert rates(6, schedule="linear", warmup_steps=2, num_planned_steps=4) == [
        *(0.125, 0.25, 0.25, 0.125, 0.0, 0.0)
    ]


def test_a_warm_up_as_long_as_the_run_is_no_division_by_zero() -> None:
    assert rates(3, schedule="cosine", warmup_steps=2, num_planned_steps=2) == [0.125, 0.25, 0.25]
