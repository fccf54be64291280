"""LoRA: an update that starts at nothing, is scaled by its rank, and may be stored in fp16."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from stability_search.tasks.lora import LoraLinear, StoredLinear

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def adapted(**more: object) -> LoraLinear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        base = StoredLinear(6, 4).half()
        chosen = {"rank": 3, "alpha": 6.0, "dtype": torch.float32, **more}
        return LoraLinear(base, **chosen)  # type: ignore[arg-type]


def test_it_starts_as_the_frozen_layer_and_only_the_second_matrix_has_a_gradient() -> None:
    layer = adapted()
    assert torch.equal(layer(X), layer.base(X))
    layer(X).square().sum().backward()
    assert layer.base.weight.grad is None
    assert layer.down.weight.grad is not None
    assert not layer.down.weight.grad.any()
    assert layer.up.weight.grad is not None
    assert layer.up.weight.grad.any()


def test_the_update_is_scaled_by_alpha_over_rank() -> None:
    layer = adapted()
    nn.init.normal_(layer.up.weight, generator=torch.Generator().manual_seed(2))
    weight = layer.base.weight.float() + 2.0 * layer.up.weight @ layer.down.weight
    assert layer.base.bias is not None
    expected = F.linear(X, weight, layer.base.bias.float())
    torch.testing.assert_close(layer(X), expected)


def test_only_the_update_is_trained_and_only_it_has_the_dtype_asked_for() -> None:
    layer = adapted(dtype=torch.float16)
    trained = {name: p.dtype for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"down.weight": torch.float16, "up.weight": torch.float16}
    assert torch.equal(layer.down.weight, adapted().down.weight.half())  # both start alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_half_weights_are_used_in_the_inputs_precision_or_in_autocasts(
    dtype: torch.dtype,
) -> None:
    layer = adapted(dtype=dtype)
    in_fp32 = layer(X)
    assert in_fp32.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(X).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(X, layer.base.weight)  # the twin: torch alone refuses
    torch.testing.assert_close(in_fp32, layer.base.float()(X))


def test_a_layer_may_have_no_bias() -> None:
    layer = StoredLinear(6, 4, bias=False).half()
    assert layer(X).shape == (5, 4)
