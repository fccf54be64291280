"""The written-out attention equals torch's own where the cap is out of reach."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine.clamps import AttentionGuard
from stability_search.engine.observer import Observer
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings

BATCH, LENGTH, WIDTH, HEADS = 3, 5, 8, 2
HIDDEN = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDED = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
PADDED[0, -2:] = True
PADDED[2, -1:] = True


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


def per_head(mask: torch.Tensor) -> torch.Tensor:
    many = mask.repeat(BATCH * HEADS, 1, 1)
    many[1] = torch.roll(many[1], 1, -1) & ~torch.eye(LENGTH, dtype=torch.bool)
    return many


ATTN_MASKS: dict[str, torch.Tensor | None] = {
    "none": None,
    "bool": HIDDEN,
    "float": additive(HIDDEN) + torch.arange(LENGTH),
    "bool per head": per_head(HIDDEN),
    "float per head": additive(per_head(HIDDEN)),
}
PADDING_MASKS = {"none": None, "bool": PADDED, "float": additive(PADDED)}


def attention(**more: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **more)
    for parameter in module.parameters():  # biases too: torch starts them at zero
        nn.init.normal_(parameter, std=0.5)
    return module


def capped(module: nn.Module, cap: float, *args: Any, **kwargs: Any) -> Any:
    settings = EngineSettings(learning_rate=0.1, attention_logit_cap=cap)
    guard = AttentionGuard(module, settings, Observer())
    try:
        with guard.acting():
            return module(*args, **kwargs)
    finally:
        guard.detach()


def inputs(module: nn.MultiheadAttention, *, is_batched: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(1)
    made = []
    for width in (WIDTH, module.kdim, module.vdim):
        x = torch.randn(BATCH, LENGTH, width)
        made.append(x if module.batch_first else x.transpose(0, 1))
    if is_batched:
        return made
    axis = 0 if module.batch_first else 1
    return [x.select(axis, 0) for x in made]


def assert_equal(ours: Any, theirs: Any) -> None:
    assert ours[0].shape == theirs[0].shape
    assert torch.allclose(ours[0], theirs[0], atol=1e-5, equal_nan=True)
    assert (ours[1] is None) == (theirs[1] is None)
    if theirs[1] is not None:
        assert ours[1].shape == theirs[1].shape
        assert torch.allclose(ours[1], theirs[1], atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("attn", "padding"), list(itertools.product(ATTN_MASKS, PADDING_MASKS)))
# torch itself warns of masks of two types, though it takes them
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
def test_a_huge_cap_changes_nothing_under_any_mask(
    attn: str, padding: str, need_weights: bool, batch_first: bool
) -> None:
    module = attention(batch_first=batch_first)
    masks = {
        "attn_mask": ATTN_MASKS[attn],
        "key_padding_mask": PADDING_MASKS[padding],
        "need_weights": need_weights,
    }
    theirs = module(*inputs(module), **masks)
    assert_equal(capped(module, 1e6, *inputs(module), **masks), theirs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": HIDDEN},
        {"attn_mask": per_head(HIDDEN)[:HEADS]},
        {"key_padding_mask": PADDED[0]},
        {"key_padding_mask": PADDED[0], "attn_mask": HIDDEN},
    ],
)
def test_nor_without_a_batch(masks: Any, need_weights: bool, batch_first: bool) -> None:
    module = attention(batch_first=batch_first)
    x = inputs(module, is_batched=False)
    theirs = module(*x, need_weights=need_weights, **masks)
    assert_equal(capped(module, 1e6, *x, need_weights=need_weights, **masks), theirs)


@pytest.mark.parametrize(
    "more",
    [
        {"kdim": 6, "vdim": 4},
        {"kdim": 6},
        {"bias": False},
        {"kdim": 6, "bias": False},
    ],
)
@pytest.mark.parametrize("average", [True, False])
def test_nor_with_other_widths_without_bias_or_per_head(more: Any, average: bool) -> None:
    module = attention(batch_first=True, **more)
    x = inputs(module)
    theirs = module(*x, average_attn_weights=average)
    assert_equal(capped(module, 1e6, *x, average_attn_weights=average), theirs)


def test_nor_to_queries_of_another_length_or_to_the_causal_hint() -> None:
    module = attention(batch_first=True)
    query, key, value = inputs(module)
    assert_equal(capped(module, 1e6, query[:, :2], key, value), module(query[:, :2], key, value))
    hinted = {"attn_mask": HIDDEN, "is_causal": True, "need_weights": False}
    assert_equal(
        capped(module, 1e6, query, key, value, **hinted), module(query, key, value, **hinted)
    )
    for run in (module, lambda *x, **kw: capped(module, 1e6, *x, **kw)):
        with pytest.raises(RuntimeError, match="is_causal"):
            run(query, key, value, is_causal=True)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_query_that_may_see_nothing_is_treated_as_torch_treats_it(need_weights: bool) -> None:
    module = attention(batch_first=True)
    mask = HIDDEN.clone()
    mask[1] = True
    x = inputs(module)
    theirs = module(*x, attn_mask=mask, need_weights=need_weights)
    ours = capped(module, 1e6, *x, attn_mask=mask, need_weights=need_weights)
    assert bool(torch.isnan(theirs[0][:, 1]).all()) == need_weights
    assert_equal(ours, theirs)


def test_gradients_are_the_same() -> None:
    module = attention(batch_first=True)
    found = []
    for run in (module, lambda *x, **kw: capped(module, 1e6, *x, **kw)):
        module.zero_grad()
        run(*inputs(module), attn_mask=HIDDEN)[0].square().sum().backward()
        found.append([parameter.grad.clone() for parameter in module.parameters()])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_dropout_acts_in_training_and_shows_in_the_weights() -> None:
    module = attention(batch_first=True, dropout=0.5)
    torch.manual_seed(5)
    theirs = module(*inputs(module))
    x = inputs(module)
    torch.manual_seed(1)
    _ = [torch.randn(BATCH, LENGTH, w) for w in (WIDTH, WIDTH, WIDTH)]
    ours = capped(module, 1e6, *x)
    for _, weights in (ours, theirs):
        assert 0.2 < (weights.mean(-1) != 1 / LENGTH).float().mean() <= 1
        assert weights.max() > 1 / LENGTH
    module.eval()
    assert_equal(capped(module, 1e6, *x), module(*x))


@pytest.mark.parametrize("cap", [0.05, 1.0, 30.0])
def test_a_small_cap_is_the_softmax_of_c_tanh_x_over_c(cap: float) -> None:
    module = attention(batch_first=True, bias=True)
    x = inputs(module)
    weight, bias = module.in_proj_weight, module.in_proj_bias
    q, k, v = (
        (part @ w.T + b).reshape(BATCH, LENGTH, HEADS, -1).permute(0, 2, 1, 3)
        for part, w, b in zip(x, weight.chunk(3), bias.chunk(3), strict=True)
    )
    logits = q @ k.mT / (WIDTH // HEADS) ** 0.5
    by_hand = torch.softmax(cap * torch.tanh(logits / cap) + additive(HIDDEN), -1)
    mixed = (by_hand @ v).permute(0, 2, 1, 3).reshape(BATCH, LENGTH, WIDTH)

    output, weights = capped(module, cap, *x, attn_mask=HIDDEN, average_attn_weights=False)

    assert torch.allclose(weights, by_hand, atol=1e-6)
    assert torch.allclose(output, module.out_proj(mixed), atol=1e-5)
    if cap == 0.05:  # it saturates: what is left of a row is nearly even
        assert weights[..., -1, :].max() < 1.2 / LENGTH
        assert module(*x)[1][..., -1, :].max() > 1.2 / LENGTH


def test_double_precision_stays_double() -> None:
    module = attention(batch_first=True).double()
    x = [part.double() for part in inputs(module)]
    ours, theirs = capped(module, 1e9, *x), module(*x)
    assert ours[0].dtype == torch.float64
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)


@pytest.mark.parametrize("more", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_extra_keys_are_refused(more: Any) -> None:
    with pytest.raises(UsageError, match="add_bias_kv or add_zero_attn cannot be capped"):
        capped(attention(**more), 1.0)


def test_a_forward_pass_of_its_own_is_not_replaced_in_silence() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, x, x)

    with pytest.raises(UsageError, match="Own overrides the forward pass"):
        capped(Own(WIDTH, HEADS), 1.0)
