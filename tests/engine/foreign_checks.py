"""What each setting does to a model that nobody here wrote, as a check of a short training."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.records.step import StepRecord
from stability_search.settings.engine import EngineSettings
from tests.engine.foreign_models import MODELS, Foreign

# -- training --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What training left behind."""

    records: list[StepRecord]
    parameters: list[torch.Tensor]
    model: nn.Module
    largest: dict[str, float]
    dtypes: dict[str, torch.dtype]


def train(
    foreign: Foreign, num_steps: int = 2, model: nn.Module | None = None, **more: Any
) -> Trained:
    """Train as the settings say, and look at what two of its layers and its attention return."""
    model = foreign.build() if model is None else model
    largest: dict[str, float] = {}
    dtypes: dict[str, torch.dtype] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            largest[name] = max(largest.get(name, 0.0), tensor.detach().abs().max().item())
            dtypes[name] = tensor.dtype

        return hook

    settings = EngineSettings(**{"learning_rate": 0.01, "num_planned_steps": 4, **more})
    with GuardedEngine(model, settings) as engine:
        layers = {"inner": foreign.inner, "outer": foreign.outer}
        is_attention = isinstance(model.get_submodule(foreign.inner), nn.MultiheadAttention)
        parent = foreign.inner.rpartition(".")[0]
        layers["attention"] = foreign.inner if is_attention else parent
        hooks = [
            model.get_submodule(path).register_forward_hook(look(name))
            for name, path in layers.items()
        ]
        records = [engine.step([foreign.batch], foreign.loss) for _ in range(num_steps)]
        for hook in hooks:
            hook.remove()
        parameters = [p.detach().clone() for p in model.parameters()]
    assert not any("forward" in module.__dict__ for module in model.modules())
    return Trained(
        records=records, parameters=parameters, model=model, largest=largest, dtypes=dtypes
    )


@functools.cache
def train_without(model: str, num_steps: int = 2, **more: Any) -> Trained:
    """Train without the setting under test, once for all tests."""
    return train(MODELS[model], num_steps, **more)


def train_plain(
    foreign: Foreign, optimizer: Callable[..., torch.optim.Optimizer], rates: list[float]
) -> list[torch.Tensor]:
    """Train in plain PyTorch at the rates given."""
    model = foreign.build()
    made = optimizer(model.parameters())
    for rate in rates:
        for group in made.param_groups:
            group["lr"] = rate
        made.zero_grad()
        foreign.loss(model, foreign.batch).backward()
        made.step()
    return [p.detach() for p in model.parameters()]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, first, second))


# -- what each setting does ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A row of the table."""

    given: Mapping[str, Any]
    act: Callable[[Foreign], None]
    is_named: bool = False

    def settings(self, foreign: Foreign) -> dict[str, Any]:
        names = {"attention_modules": (foreign.attention,)} if self.is_named else {}
        return {**self.given, **names}


def equals_plain(
    build: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    rates: tuple[float, ...] = (0.01, 0.01),
    **given: Any,
) -> Check:
    """Make a check that training equals plain PyTorch with the same, to the bit."""
    build = functools.partial(build, fused=True)

    def act(foreign: Foreign) -> None:
        ours = train(foreign, len(rates), **given)
        assert [r.learning_rate for r in ours.records] == pytest.approx(list(rates))
        theirs = train_plain(foreign, build, [r.learning_rate for r in ours.records])
        assert are_equal(ours.parameters, theirs)
        other = {"optimizer": "sgd"} if given == {"optimizer": "adamw"} else {}
        without = train_without(foreign.name, len(rates), **other)
        assert not are_equal(ours.parameters, without.parameters)

    return Check(given=given, act=act)


def _adamw(**more: Any) -> Callable[..., torch.optim.Optimizer]:
    return functools.partial(torch.optim.AdamW, **more)


def computes_in(dtype: torch.dtype, **given: Any) -> Check:
    def act(foreign: Foreign) -> None:
        ours, plain = train(foreign, **given), train_without(foreign.name)
        assert ours.dtypes["outer"] == dtype
        assert {p.dtype for p in ours.parameters} == {torch.float32}
        assert (ours.records[0].scale is not None) == (dtype == torch.float16)
        assert ours.records[0].loss == pytest.approx(plain.records[0].loss, rel=0.02)
        assert {r.label.value for r in ours.records} <= {"ok", "calibration"}

    return Check(given=given, act=act)


def scales(expected: list[float], **given: Any) -> Check:
    def act(foreign: Foreign) -> None:
        found = train(foreign, 4, precision="fp16", **given).records
        assert [record.scale for record in found] == expected

    return Check(given={"precision": "fp16", **given}, act=act)


def _clips(foreign: Foreign) -> None:
    ours = train(foreign, 1, optimizer="sgd", learning_rate=1.0, clip_norm=1e-3)
    (record,) = ours.records
    assert record.clipped
    assert record.grad_norm is not None
    assert record.grad_norm > 1e-3
    moved = [b - a for a, b in zip(foreign.build().parameters(), ours.parameters, strict=True)]
    assert torch.nn.utils.get_total_norm(moved).item() == pytest.approx(1e-3, rel=1e-2)
    assert not train_without(foreign.name).records[0].clipped


def _clamps(foreign: Foreign, **named: Any) -> None:
    limit = 0.01
    ours, free = train(foreign, attention_clamp=limit, **named), train_without(foreign.name)
    assert ours.largest["attention"] == pytest.approx(limit)
    assert free.largest["attention"] > limit
    assert ours.records[0].clamp_frac is not None
    assert 0.0 < ours.records[0].clamp_frac < 1.0
    assert free.records[0].clamp_frac is None


def _caps(foreign: Foreign, **named: Any) -> None:
    ours = train(foreign, attention_logit_cap=0.01, **named)
    free = train_without(foreign.name)
    record = ours.records[0]
    assert record.cap_frac is not None
    assert 0.1 < record.cap_frac <= 1.0
    assert record.attention_max is not None
    assert record.attention_max > 0.01  # seen before the cap acts
    assert record.loss != free.records[0].loss
    assert free.records[0].cap_frac is None


def _attends_in_fp32(foreign: Foreign, **named: Any) -> None:
    ours = train(foreign, precision="fp16", attention_precision="fp32", **named)
    free = train_without(foreign.name, precision="fp16")
    assert (ours.dtypes["inner"], ours.dtypes["outer"]) == (torch.float32, torch.float16)
    assert (free.dtypes["inner"], free.dtypes["outer"]) == (torch.float16, torch.float16)


def _named(act: Callable[..., None]) -> Callable[[Foreign], None]:
    return lambda foreign: act(foreign, attention_modules=(foreign.attention,))


def _gains(foreign: Foreign) -> None:
    ours = train(foreign, 1, init_gain=0.5, optimizer="sgd", learning_rate=1e-30)
    for before, after in zip(foreign.build().parameters(), ours.parameters, strict=True):
        assert torch.allclose(after, before * (0.5 if before.dim() > 1 else 1.0))


def _regroups(foreign: Foreign) -> None:
    ours = train(foreign, 3, norm="group")
    kinds = {type(module) for module in ours.model.modules()}
    assert nn.GroupNorm in kinds
    assert nn.BatchNorm2d not in kinds
    losses = [record.loss for record in ours.records]
    assert losses[-1] < losses[0]
    assert losses[0] != train_without(foreign.name).records[0].loss


def _recomputes(foreign: Foreign) -> None:
    numel: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        numel[-1] += tensor.numel()
        return tensor

    found = []
    for is_on in (False, True):
        numel.append(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(train(foreign, gradient_checkpointing=is_on))
    free, ours = found
    assert numel[1] < 0.8 * numel[0]
    assert [r.loss for r in ours.records] == [r.loss for r in free.records]
    assert are_equal(ours.parameters, free.parameters)
    counts = [b for n, b in ours.model.named_buffers() if n.endswith("num_batches_tracked")]
    assert all(count == 2 for count in counts)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in ours.model.modules())
    assert not any(module._forward_hooks for module in ours.model.modules())  # noqa: SLF001 - left by nobody


def survives(way: str) -> Check:
    def act(foreign: Foreign) -> None:
        model = foreign.build()
        before = [p.clone() for p in model.parameters()]

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            factor, inputs = batch
            return foreign.loss(model, inputs) * factor

        window = [(torch.tensor(factor), foreign.batch) for factor in (1.0, math.inf)]
        settings = EngineSettings(learning_rate=0.01, bad_microbatch=way)  # type: ignore[arg-type]
        with GuardedEngine(model, settings) as engine:
            record = engine.step(window, loss)
        assert record.label.value == "data"
        assert record.is_applied == (way == "skip")
        is_same = all(map(torch.equal, before, model.parameters()))
        assert is_same == (way == "drop")

    return Check(given={"bad_microbatch": way}, act=act)


CHECKS: dict[str, Check] = {
    "learning_rate": equals_plain(rates=(0.03, 0.03), learning_rate=0.03),
    "optimizer=adamw": equals_plain(optimizer="adamw"),
    "optimizer=adam": equals_plain(torch.optim.Adam, optimizer="adam"),
    "optimizer=sgd": equals_plain(torch.optim.SGD, optimizer="sgd"),
    "weight_decay": equals_plain(_adamw(weight_decay=0.5), weight_decay=0.5),
    "beta1": equals_plain(_adamw(betas=(0.5, 0.999)), beta1=0.5),
    "beta2": equals_plain(_adamw(betas=(0.9, 0.5)), beta2=0.5),
    "momentum": equals_plain(
        functools.partial(torch.optim.SGD, momentum=0.9), optimizer="sgd", momentum=0.9
    ),
    "eps": equals_plain(_adamw(eps=0.1), eps=0.1),
    "warmup_steps": equals_plain(rates=(0.005, 0.01), warmup_steps=2),
    "schedule=linear": equals_plain(rates=(0.01, 0.0075), schedule="linear"),
    "schedule=cosine": equals_plain(
        rates=tuple(0.005 * (1 + math.cos(math.pi * k / 4)) for k in range(2)), schedule="cosine"
    ),
    "precision=fp32": computes_in(torch.float32, precision="fp32"),
    "precision=bf16": computes_in(torch.bfloat16, precision="bf16"),
    "precision=fp16": computes_in(torch.float16, precision="fp16"),
    "fp16_on_cpu=native": computes_in(torch.float16, precision="fp16", fp16_on_cpu="native"),
    "init_scale": scales([8.0] * 4, init_scale=8.0),
    "growth_interval": scales([8.0, 8.0, 16.0, 16.0], init_scale=8.0, growth_interval=2),
    "max_scale": scales([8.0, 16.0, 16.0, 16.0], init_scale=8.0, growth_interval=1, max_scale=16),
    "clip_norm": Check(given={"clip_norm": 1e-3}, act=_clips),
    "attention_clamp": Check(given={"attention_clamp": 0.01}, act=_clamps),
    "attention_clamp@": Check(given={"attention_clamp": 0.01}, act=_named(_clamps), is_named=True),
    "attention_logit_cap": Check(given={"attention_logit_cap": 0.01}, act=_caps),
    "attention_logit_cap@": Check(
        given={"attention_logit_cap": 0.01}, act=_named(_caps), is_named=True
    ),
    "attention_precision": Check(given={"attention_precision": "fp32"}, act=_attends_in_fp32),
    "attention_precision@": Check(
        given={"attention_precision": "fp32"}, act=_named(_attends_in_fp32), is_named=True
    ),
    "attention_modules=lists": Check(
        given={"attention_clamp": 1.0, "attention_modules": ("*layers",)}, act=_clamps
    ),
    "init_gain": Check(given={"init_gain": 0.5}, act=_gains),
    "norm": Check(given={"norm": "group"}, act=_regroups),
    "gradient_checkpointing": Check(given={"gradient_checkpointing": True}, act=_recomputes),
    "bad_microbatch=skip": survives("skip"),
    "bad_microbatch=drop": survives("drop"),
}
