"""The cap on attention logits: where it acts, what it refuses, and what it leaves alone."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search import cap_logits
from stability_search.engine import GuardedEngine
from stability_search.errors import UsageError
from tests.engine.attending import Attends, guard, mean_loss, settings

HIDDEN = torch.ones(5, 5, dtype=torch.bool).triu(1)


def qkv(heads: int = 4, kv_heads: int = 4) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, count, 5, 8) for count in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("cap", [1e6, 0.7])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"is_causal": True},
        {"attn_mask": ~HIDDEN},
        {"attn_mask": torch.zeros(5, 5).masked_fill(HIDDEN, -math.inf)},
        {"attn_mask": ~HIDDEN, "scale": 0.3},
        {"enable_gqa": True},
        {"enable_gqa": True, "is_causal": True},
    ],
)
def test_fused_attention_is_capped_before_the_mask(more: Any, cap: float) -> None:
    q, k, v = qkv(kv_heads=2 if "enable_gqa" in more else 4)
    theirs = F.scaled_dot_product_attention(q, k, v, **more)
    with guard(attention_logit_cap=cap).acting():
        ours = F.scaled_dot_product_attention(q, k, v, **more)
    assert torch.allclose(ours, theirs, atol=1e-5) == (cap == 1e6)

    if "enable_gqa" in more:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    logits = q @ k.mT * more.get("scale", 8**-0.5)
    logits = cap * torch.tanh(logits / cap)
    if more.get("is_causal") or "attn_mask" in more:
        logits = logits.masked_fill(HIDDEN, -math.inf)
    assert torch.allclose(ours, torch.softmax(logits, -1) @ v, atol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_as_in_fused_attention() -> None:
    q, k, v = qkv()
    mask = ~HIDDEN
    mask[2] = False
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with guard(attention_logit_cap=1e6).acting():
        ours = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert ours[:, :, 2].abs().max() == theirs[:, :, 2].abs().max() == 0
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_attention_of_ones_own_opts_in() -> None:
    logits = torch.tensor([[-200.0, 1.0], [10.0, 30.0]])
    assert cap_logits(logits) is logits
    with guard(attention_logit_cap=10.0).acting():
        assert torch.equal(cap_logits(logits), 10 * torch.tanh(logits / 10))
    with guard().acting():
        assert cap_logits(logits) is logits
    assert cap_logits(logits) is logits


@pytest.mark.parametrize("kind", ["multihead", "fused", "own"])
def test_every_way_of_attending_is_capped_and_counted(kind: str) -> None:
    model = Attends(kind, gain=100.0)
    with GuardedEngine(model, settings(attention_logit_cap=2.0)) as engine:
        record = engine.step([torch.randn(3, 6, 4)], mean_loss)
    assert record.cap_frac is not None
    assert 0.9 < record.cap_frac <= 1.0
    assert record.attention_max is not None
    assert record.attention_max > 100


def test_a_cap_that_nothing_went_through_is_refused() -> None:
    engine = GuardedEngine(nn.Linear(4, 4), settings(attention_logit_cap=2.0))
    with engine, pytest.raises(UsageError, match="no attention of the model went through"):
        engine.step([torch.randn(3, 6, 4)], mean_loss)


class Several(nn.Module):
    """One attention after another."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attends(kind) for kind in kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def by_name(module: nn.Module, x: torch.Tensor, fused: Any) -> torch.Tensor:
    return fused(module.q(x), module.k(x), x)


def in_torch(module: nn.Module, x: torch.Tensor, *, need_weights: bool) -> torch.Tensor:
    own = module.attention
    return F.multi_head_attention_forward(
        *(x, x, x, 4, 1, own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0),
        *(own.out_proj.weight, own.out_proj.bias),
        need_weights=need_weights,
    )[0]


WAYS_OF_ATTENDING: dict[str, Any] = {
    "matmul": lambda m, x: torch.softmax(torch.matmul(m.q(x), m.k(x).mT), -1) @ x,
    "bmm and dropout": lambda m, x: torch.bmm(
        F.dropout(F.softmax(torch.bmm(m.q(x), m.k(x).mT) / 2, -1), 0.1), x
    ),
    "einsum and a mask": lambda m, x: torch.einsum(
        "bqk,bkd->bqd",
        torch.einsum("bqd,bkd->bqk", m.q(x), m.k(x)).masked_fill(HIDDEN, -1e4).softmax(-1),
        x,
    ),
    "nn.Softmax in another shape": lambda m, x: (
        nn.Softmax(-1)((m.q(x) @ m.k(x).mT).unsqueeze(1).float()).squeeze(1).type_as(x) @ x
    ),
    "fused by name": lambda m, x, fused=F.scaled_dot_product_attention: by_name(m, x, fused),
    "torch's own, with weights": lambda m, x: in_torch(m, x, need_weights=True),
}


@pytest.mark.parametrize("way", WAYS_OF_ATTENDING)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_cap_that_reaches_only_some_attention_is_refused(way: str, precision: str) -> None:
    class Missed(Attends):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return WAYS_OF_ATTENDING[way](self, x)

    model = Several("fused", "own")
    model.layers.append(Missed())
    before = [parameter.clone() for parameter in model.parameters()]
    x = torch.randn(3, 5, 4)
    chosen = settings(attention_logit_cap=2.0, precision=precision)
    with GuardedEngine(model, chosen) as engine:
        for _ in range(2):
            with pytest.raises(UsageError, match=r"cap of 2 to act, but layers\.2 \(Missed\) "):
                engine.step([x], mean_loss)
    assert all(map(torch.equal, before, model.parameters()))


def test_attention_that_is_not_named_may_stay_without_the_cap() -> None:
    model = Several("fused", "hidden")
    x = torch.randn(3, 5, 4)
    for name, is_refused in (("layers.0", False), ("layers.1", True)):
        chosen = settings(attention_logit_cap=2.0, attention_modules=(name,))
        with GuardedEngine(model, chosen) as engine:
            if is_refused:
                with pytest.raises(UsageError, match=r"layers\.1 \(Attends\) takes a softmax"):
                    engine.step([x], mean_loss)
            else:
                assert engine.step([x], mean_loss).cap_frac is not None


def test_what_is_no_attention_is_not_taken_for_one() -> None:
    """Gates, mixtures, a classifier, and logits that are capped by hand."""

    class Gated(Several):
        def __init__(self) -> None:
            super().__init__("fused", "multihead", "own")
            self.gate = nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            x = F.softmax(self.gate(x), -1) @ self.weight
            x = torch.softmax(x @ self.weight.T, -1) @ x.mT @ x
            logits = 5 * torch.tanh(x @ x.mT / 5)
            return logits.softmax(-1) @ x

    with GuardedEngine(Gated(), settings(attention_logit_cap=2.0)) as engine:
        for _ in range(2):
            assert engine.step([torch.randn(3, 4, 4)], mean_loss).label.value == "ok"


def test_nothing_watches_after_the_first_forward_pass() -> None:
    seen: list[int] = []

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(torch.overrides._get_current_function_mode_stack()))  # noqa: SLF001 - its purpose
        return mean_loss(module, batch)

    for more in ({}, {"attention_logit_cap": 2.0}):
        with GuardedEngine(Attends(), settings(**more)) as engine:
            for _ in range(3):
                engine.step([torch.randn(3, 6, 4)], loss)
    assert seen == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_cap_acts_in_a_transformer_layer_when_it_is_evaluated(precision: str) -> None:
    """In eval mode torch's fast path would pass the attention module by."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with torch.no_grad():
        layer.self_attn.in_proj_weight.mul_(20)
    x = torch.randn(2, 6, 8)
    plain = mean_loss(layer.eval(), x).item()
    model = nn.ModuleList([layer]).train()
    chosen = settings(attention_logit_cap=0.1, precision=precision)

    def loss(holder: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return holder[0](batch).float().square().mean()  # type: ignore[index]

    def target(holder: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (holder[0](batch).float() - 1).abs().mean()  # type: ignore[index]

    with GuardedEngine(model, chosen) as engine:
        in_training = mean_loss_without_grad(engine, lambda: target(model, x))
        (evaluated,) = engine.evaluate([x], target)
    assert evaluated == pytest.approx(in_training, rel=1e-5)
    assert loss(model, x).item() == pytest.approx(plain, rel=1e-5)
    assert evaluated != pytest.approx(target(model.eval(), x).item(), rel=1e-3)
    assert torch.backends.mha.get_fastpath_enabled()


def mean_loss_without_grad(engine: GuardedEngine, run: Any) -> float:
    with torch.no_grad(), engine._attention.acting():  # noqa: SLF001 - train mode, else as evaluate
        return float(run())


def test_what_stands_for_torchs_functions_has_their_names() -> None:
    """torch.compile asks for them, of every function there is."""
    with guard(attention_logit_cap=2.0).acting():
        assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
        assert F.softmax.__name__ == "softmax"


def test_the_model_of_an_engine_inside_another_has_only_its_own_cap() -> None:
    outer, inner = Attends("fused", gain=50.0), Attends("fused", gain=50.0)
    x = torch.randn(2, 3, 4)
    alone = inner(x).detach()
    seen: list[torch.Tensor] = []

    def inner_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(module(batch))
        return seen[-1].square().mean()

    with (
        GuardedEngine(outer, settings(attention_logit_cap=0.1)) as first,
        GuardedEngine(inner, settings()) as second,
    ):

        def outer_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            second.step([batch], inner_loss)
            return mean_loss(module, batch)

        assert first.step([x], outer_loss).cap_frac is not None
    assert torch.equal(seen[0], alone)


def test_the_reference_is_neither_capped_nor_watched() -> None:
    reference = Attends("fused", gain=50.0)
    x = torch.randn(2, 3, 4)
    alone = reference(x).detach()
    seen: dict[int, torch.Tensor] = {}

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen[id(module)] = module(batch)
        return seen[id(module)].square().mean() * (math.nan if module is not reference else 1.0)

    engine = GuardedEngine(
        Attends("fused"), settings(attention_logit_cap=0.1), reference=lambda: reference
    )
    with engine:
        assert engine.step([x], loss).label.value == "bad"
    assert torch.equal(seen[id(reference)], alone)
