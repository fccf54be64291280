"""nn.MultiheadAttention written out, so that its logits can be reached before the softmax."""

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.errors import UsageError

# (query, key, additive mask, factor) -> attention weights
Weigh = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]


def check_can_write_out(module: nn.MultiheadAttention) -> None:
    """Refuse variants that `multihead_forward` does not know.

    Raises:
        UsageError: Extra keys, or a subclass with a forward pass of its own.
    """
    if module.bias_k is not None or module.add_zero_attn:
        raise UsageError(
            "attention_logit_cap: nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot "
            "be capped.",
            hint="Build it without them, or leave the cap out.",
        )
    if type(module).forward is not nn.MultiheadAttention.forward:
        raise UsageError(
            f"attention_logit_cap: {type(module).__name__} overrides the forward pass of "
            "nn.MultiheadAttention, which the cap would replace.",
            hint="Derive it from nn.Module and call stability_search.cap_logits on its logits.",
        )


def multihead_forward(  # noqa: PLR0913, PLR0917 - the signature of nn.MultiheadAttention.forward
    module: nn.MultiheadAttention,
    weigh: Weigh,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what nn.MultiheadAttention does, with `weigh` for the softmax of the logits."""
    if is_causal and attn_mask is None:
        raise RuntimeError("is_causal: it is a hint about attn_mask and needs one.")  # as torch
    is_batched = query.dim() == 3  # noqa: PLR2004 - (batch, time, width)
    batch_axis = 0 if module.batch_first else 1
    inputs = [x if is_batched else x.unsqueeze(batch_axis) for x in (query, key, value)]
    if key_padding_mask is not None and not is_batched:
        key_padding_mask = key_padding_mask.unsqueeze(0)
    q, k, v = _heads(module, inputs)
    mask = _joined_mask(attn_mask, key_padding_mask, module.num_heads)
    weights = weigh(q, k, mask, 1 / math.sqrt(q.size(-1)))
    if not need_weights:
        weights = zero_where_all_masked(weights, mask)  # as the fused kernel does
    weights = F.dropout(weights, module.dropout, module.training)
    output = module.out_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
    if not module.batch_first:
        output = output.transpose(0, 1)
    if not is_batched:
        output = output.squeeze(batch_axis)
    if not need_weights:
        return output, None
    shown = weights.mean(1) if average_attn_weights else weights
    return output, shown if is_batched else shown.squeeze(0)


def additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Turn a boolean mask, true where a key is hidden, into one to add."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -math.inf)


def zero_where_all_masked(weights: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Give a query that may see no key weights of zero instead of NaN, as fused attention does."""
    if mask is None:
        return weights
    sees_none = torch.isneginf(mask).all(dim=-1, keepdim=True)
    return weights.masked_fill(sees_none, 0.0)


def _heads(module: nn.MultiheadAttention, inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    # (batch, heads, time, head width) of query, key and value
    for x, (weight, bias) in zip(inputs, _projections(module), strict=True):
        batch_first = x if module.batch_first else x.transpose(0, 1)
        projected = F.linear(batch_first, weight, bias)
        width = projected.size(-1) // module.num_heads  # said, since a sequence may be empty
        by_head = projected.view(*projected.shape[:2], module.num_heads, width)
        yield by_head.transpose(1, 2)


def _projections(
    module: nn.MultiheadAttention,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    weights = (
        module.in_proj_weight.chunk(3)
        if module._qkv_same_embed_dim  # noqa: SLF001 - which weights it has
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    bias = cast("torch.Tensor | None", module.in_proj_bias)
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return zip(weights, biases, strict=True)


def _joined_mask(
    attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, num_heads: int
) -> torch.Tensor | None:
    mask = additive(attn_mask)
    if mask is not None and mask.dim() == 3:  # noqa: PLR2004 - (batch*heads, query, key)
        mask = mask.view(-1, num_heads, *mask.shape[1:])
    padding = additive(key_padding_mask)
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding
