"""Clamp and watch: what acts on attention, what is seen of it, and what is left behind."""

import collections
import copy
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

# -- clamp -----------------------------------------------------------------------------------


def test_the_clamp_counts_before_it_acts() -> None:
    model = Attends(gain=1.0)
    x = torch.randn(4, 6, 4) * 10
    free = model(x)
    limit = free.abs().median().item()

    seen: list[torch.Tensor] = []

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        y = module(batch)
        seen.append(y)
        return y.square().mean()

    with GuardedEngine(model, settings(attention_clamp=limit)) as engine:
        record = engine.step([x], loss)
    assert torch.equal(seen[0], free.clamp(-limit, limit))
    assert record.clamp_frac == pytest.approx((free.abs() > limit).float().mean().item())
    assert record.clamp_frac == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_before_the_clamp_is_a_forward_fault_though_it_is_clamped_away(
    value: float,
) -> None:
    class Overflows(nn.MultiheadAttention):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return torch.where(x > 0, self.out_proj(x) * 0 + value, self.out_proj(x)), None

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Overflows(4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x)[0]

    batch = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    with GuardedEngine(Model(), settings(attention_clamp=10.0)) as engine:
        record = engine.step([batch], mean_loss)
    assert (record.label.value, record.is_loss_finite) == ("bad", True)
    assert record.reason == "attention output is Inf"
    assert not record.is_applied
    # The twin: without the clamp's own measurement the loss is finite and nothing is seen.
    assert torch.isfinite(torch.tensor(value).clamp(-10.0, 10.0))


@pytest.mark.parametrize("fp16_on_cpu", ["emulated", "native"])
def test_a_clamp_beyond_the_range_of_fp16_clamps_nothing(fp16_on_cpu: str) -> None:
    """Torch refuses a bound that the type of the tensor cannot hold."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    chosen = settings(precision="fp16", attention_clamp=1e5, fp16_on_cpu=fp16_on_cpu)
    with GuardedEngine(model, chosen) as engine:
        record = engine.step([torch.randn(2, 5, 8)], mean_loss)
    assert (record.label, record.clamp_frac) == ("ok", 0.0)


def test_a_clamp_cannot_rescue_overflowed_logits_and_a_cap_can() -> None:
    x = torch.randn(4, 6, 4)
    found = {}
    for name, more in {
        "clamp": {"attention_clamp": 10.0},
        "cap": {"attention_logit_cap": 30.0},
        "bf16": {"precision": "bf16"},
        "fp32 attention": {"attention_precision": "fp32"},
    }.items():
        chosen = settings(**{"precision": "fp16", **more})
        with GuardedEngine(Attends(gain=1500.0), chosen) as engine:
            found[name] = engine.step([x], mean_loss)
    assert {name: record.is_loss_finite for name, record in found.items()} == {
        "clamp": False,
        "cap": True,
        "bf16": True,
        "fp32 attention": True,
    }
    assert found["clamp"].label.value == "bad"
    assert found["cap"].attention_max is not None  # in fp32, where it has not overflowed
    assert found["cap"].attention_max > 65504
    assert found["clamp"].first_nonfinite_module == "attention"


def test_a_clamp_on_what_is_no_tensor_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.odd = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.odd({"y": self.inner(x)})["y"]

    engine = GuardedEngine(Odd(), settings(attention_clamp=1.0, attention_modules=("odd",)))
    with (
        engine,
        pytest.raises(
            UsageError, match=r"odd \(Identity\) must return a tensor.* but returned dict"
        ),
    ):
        engine.step([torch.ones(1, 2)], mean_loss)


# -- which modules ---------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"attn": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
        self.decoder = nn.ModuleDict({"attn": nn.Linear(2, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.fill_(10.0)
        return self.decoder["attn"](self.encoder["mlp"](self.encoder["attn"](x)))


@pytest.mark.parametrize(
    ("patterns", "num_clamped"),
    [(("*.attn",), 2), (("encoder.*",), 2), (("encoder.attn", "decoder.attn", "*.mlp"), 3)],
)
def test_patterns_choose_the_modules(patterns: tuple[str, ...], num_clamped: int) -> None:
    model = Two()
    found = guard(model, attention_clamp=1.0, attention_modules=patterns)
    with found.recording():
        model(torch.ones(1, 2))
    assert len(found.clamp_fracs) == num_clamped


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no module of the model matches \*\.attention"):
        guard(Two(), attention_modules=("*.attention",))


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"attention_clamp": 1.0}, "attention_clamp"),
        ({"attention_precision": "fp32"}, "attention_precision"),
    ],
)
def test_a_setting_without_attention_to_act_on_is_refused(more: Any, name: str) -> None:
    message = rf"{name}: \S+ needs attention modules .* the model has no nn\.MultiheadAttention"
    with pytest.raises(UsageError, match=message):
        guard(nn.Linear(1, 1), **more)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fp32_attention_computes_in_fp32_and_the_rest_does_not(precision: str) -> None:
    dtypes = {}

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        hook = module.attention.out_proj.register_forward_hook(lambda *_: None)
        dtypes["attention"] = module.attention(batch.half(), batch.half(), batch.half())[0].dtype
        dtypes["rest"] = module.q(batch).dtype
        hook.remove()
        return mean_loss(module, batch)

    chosen = settings(precision=precision, attention_precision="fp32")
    with GuardedEngine(Attends(), chosen) as engine:
        assert engine.step([torch.randn(2, 3, 4)], loss).label.value == "ok"
    assert dtypes["attention"] == torch.float32
    assert dtypes["rest"] == (torch.bfloat16 if precision == "bf16" else torch.float16)


def test_half_precision_is_found_in_nested_arguments() -> None:
    """Position embeddings come as a pair, a cache as a list that the module writes into."""
    Pair = collections.namedtuple("Pair", "cos sin")  # noqa: PYI024 - as an older library has it
    half, single = torch.ones(1, dtype=torch.float16), torch.ones(1)
    seen: dict[str, Any] = {}

    class Rotary(nn.Linear):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
            seen.update(args=args, **kwargs)
            kwargs["cache"].append(x)
            return super().forward(x)

    model = nn.ModuleDict({"attn": Rotary(1, 1)})
    cache: list[torch.Tensor] = [single]
    tables = {"deep": [{"sin": half}], "n": 3}

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        pair = Pair(half, single)
        return module["attn"](batch, (half, None), pair=pair, cache=cache, tables=tables).mean()  # type: ignore[index]

    chosen = settings(attention_precision="fp32", attention_modules=("attn",), precision="fp16")
    with GuardedEngine(model, chosen) as engine:
        assert engine.step([half], loss).label.value == "ok"
    assert seen["args"][0][0].dtype == torch.float32
    assert seen["args"][0][1] is None
    assert isinstance(seen["pair"], Pair)
    assert seen["pair"].cos.dtype == torch.float32
    assert seen["tables"]["deep"][0]["sin"].dtype == torch.float32
    assert seen["cache"] is cache
    assert len(cache) == 2


def test_the_clamp_keeps_the_rest_of_an_output_and_acts_where_forward_is_called() -> None:
    Output = collections.namedtuple("Output", "hidden weights")  # noqa: PYI024 - as above

    class Named(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            return Output(super().forward(x), None)

    model = nn.ModuleDict({"attn": Named(4, 4)})
    outputs = []

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        outputs.append(module["attn"].forward(batch))  # type: ignore[index]
        return outputs[-1].hidden.mean()

    chosen = settings(attention_clamp=0.01, attention_modules=("attn",))
    with GuardedEngine(model, chosen) as engine:
        record = engine.step([torch.randn(5, 4)], loss)
    assert isinstance(outputs[0], Output)
    assert outputs[0].weights is None
    assert outputs[0].hidden.abs().max().item() == pytest.approx(0.01)
    assert record.clamp_frac is not None


@pytest.mark.parametrize("more", [{"attention_clamp": 1.0}, {"attention_precision": "fp32"}])
def test_modules_that_are_not_called_are_refused(more: Any) -> None:
    """nn.MultiheadAttention uses the weights of its out_proj, but does not call it."""
    patterns = ("attention", "*.out_proj")
    with GuardedEngine(Attends(), settings(attention_modules=patterns, **more)) as engine:
        for _ in range(2):
            with pytest.raises(UsageError, match=r"the model did not call attention\.out_proj\."):
                engine.step([torch.randn(2, 3, 4)], mean_loss)


@pytest.mark.parametrize("kind", ["multihead", "fused", "own"])
@pytest.mark.parametrize("more", [{}, {"attention_logit_cap": 2.0}])
def test_a_sequence_without_elements_breaks_nothing(kind: str, more: Any) -> None:
    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(batch).sum() + sum(p.square().sum() for p in module.parameters())

    with GuardedEngine(Attends(kind), settings(**more)) as engine:
        record = engine.step([torch.zeros(2, 0, 4)], loss)
    assert (record.label.value, record.attention_max, record.cap_frac) == ("ok", None, None)


@pytest.mark.parametrize("more", [{}, {"attention_clamp": 1e6}, {"attention_logit_cap": 1e6}])
def test_a_padded_encoder_is_measured_alike_under_every_setting(more: Any) -> None:
    """In eval mode torch's fast path gives zeros in padded places, and takes no clamp."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    x, is_padding = torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool)
    is_padding[0, 3:] = True

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (module(batch, src_key_padding_mask=is_padding) - 1).abs().mean()

    in_training = loss(model, x).item()
    with GuardedEngine(model, settings(**more)) as engine:
        (evaluated,) = engine.evaluate([x], loss)
    assert evaluated == pytest.approx(in_training, rel=1e-5)


def test_frozen_half_precision_attention_cannot_run_in_fp32() -> None:
    model = Attends()
    model.attention.half().requires_grad_(requires_grad=False)
    with pytest.raises(
        UsageError, match="frozen ones of MultiheadAttention are stored in float16"
    ):
        guard(model, attention_precision="fp32")


# -- what is seen ----------------------------------------------------------------------------


def test_the_largest_logit_of_the_first_attention_is_seen() -> None:
    model = Attends("own")
    logits = [torch.tensor([[-7.0, 2.0]]), torch.tensor([[100.0]])]

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        for one in logits:
            cap_logits(one)
        return mean_loss(module, batch)

    with GuardedEngine(model, settings()) as engine:
        assert engine.step([torch.randn(2, 3, 4)], loss).attention_max == 7.0


def test_materialised_logits_are_seen_but_not_another_softmax() -> None:
    model = Attends(gain=3.0)
    x = torch.randn(2, 3, 4)

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        F.softmax(torch.full((2, 3, 4), 1e6), dim=-1)  # a gate, say, before the attention
        return mean_loss(module, batch)

    weight, bias = model.attention.in_proj_weight, model.attention.in_proj_bias
    q, k = (
        (3 * x) @ w.T + b for w, b in list(zip(weight.chunk(3), bias.chunk(3), strict=True))[:2]
    )
    largest = (q @ k.mT / 2).max().item()
    with GuardedEngine(model, settings()) as engine:
        assert engine.step([x], loss).attention_max == pytest.approx(largest, rel=1e-5)


def test_fused_logits_are_bounded_by_the_norms() -> None:
    model = Attends("fused")
    x = torch.randn(2, 3, 4)
    q, k = model.q(x), model.k(x)
    bound = (q.norm(dim=-1).max() * k.norm(dim=-1).max() / 2).item()
    assert bound >= (q @ k.mT / 2).abs().max().item()
    with GuardedEngine(model, settings()) as engine:
        assert engine.step([x], mean_loss).attention_max == pytest.approx(bound, rel=1e-5)


# -- what is left behind ---------------------------------------------------------------------


def everything_global() -> tuple[Any, ...]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    return F.scaled_dot_product_attention, F.softmax, fast_path


@pytest.mark.parametrize("has_exception", [False, True])
def test_everything_is_back_after_close(has_exception: bool) -> None:
    model = nn.ModuleDict({"attends": Attends(), "blocks": nn.Sequential(nn.Linear(4, 4))})
    names, before = list(model.state_dict()), everything_global()

    def loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        assert everything_global() != before
        if has_exception:
            raise KeyError("user code")
        return module["blocks"](module["attends"](batch)).float().square().mean()  # type: ignore[index]

    chosen = settings(
        attention_clamp=1.0,
        attention_logit_cap=2.0,
        attention_precision="fp32",
        gradient_checkpointing=True,
        precision="fp16",
    )
    engine = GuardedEngine(model, chosen)
    assert list(model.state_dict()) == names
    if has_exception:
        with pytest.raises(KeyError, match="user code"), engine:
            engine.step([torch.randn(2, 3, 4)], loss)
    else:
        with engine:
            engine.step([torch.randn(2, 3, 4)], loss)
            assert everything_global() == before

    assert everything_global() == before
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks  # noqa: SLF001 - what this test is about
        assert not module._forward_pre_hooks  # noqa: SLF001 - as above


def test_nothing_is_left_on_a_model_whose_engine_was_refused() -> None:
    model = Attends()
    with pytest.raises(UsageError, match=r"no nn\.ModuleList or nn.Sequential"):
        GuardedEngine(model, settings(attention_clamp=1.0, gradient_checkpointing=True))
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())  # noqa: SLF001


def test_a_copied_model_is_capped_with_its_own_weights() -> None:
    model = Attends()
    x = torch.randn(2, 3, 4)
    with GuardedEngine(model, settings(attention_logit_cap=1.0, attention_clamp=5.0)) as engine:
        engine.step([x], mean_loss)
        average = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert model(x).abs().max() == 0
        assert average(x).abs().max() > 0
