"""Attention: clamp on the output, cap on the logits, and what both had to do.

Saturation and finiteness are measured before a clamp acts, so that a clamp cannot win
cosmetically. `clamp(nan)` is NaN and its gradient is zero outside the range: a clamp on the
output cannot rescue overflowed logits, a cap on the logits can.
"""

import contextlib
import fnmatch
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

_active: ContextVar["AttentionGuard | None"] = ContextVar("attention_guard", default=None)


def cap_logits(logits: torch.Tensor) -> torch.Tensor:
    """Cap attention logits where the running configuration asks for it.

    Call it in attention of your own, before the mask is added and before the softmax; outside a
    guarded engine, or without `attention_logit_cap`, it changes nothing.

    Args:
        logits: Attention logits, any shape and float dtype; the first call of a forward pass is
            recorded as `attention_max`.

    Returns:
        c * tanh(logits / c), or the logits themselves.
    """
    guard = _active.get()
    return logits if guard is None else guard.see_logits(logits)


def _attention_modules(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    if not patterns:
        return [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    found = [
        module
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if not found:
        raise UsageError(
            f"attention_modules: no module of the model matches {', '.join(patterns)}.",
            hint="Compare with the names of model.named_modules().",
        )
    return found


class AttentionGuard:
    """Clamp, cap and watch the attention of one model.

    Args:
        model: The model; its attention modules are changed until `detach`.
        settings: `attention_*` settings.

    Raises:
        UsageError: A clamp or fp32 attention is asked for and no attention module is found, or
            the cap meets an attention module it cannot compute.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings) -> None:
        self._clamp = settings.attention_clamp
        self._cap = settings.attention_logit_cap
        self._fp32 = settings.attention_precision == "fp32"
        self._modules = _attention_modules(model, settings.attention_modules)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._is_recording = False
        self._saw_first = False
        self.num_capped_calls = 0
        self.logit_maxima: list[torch.Tensor] = []
        self.output_maxima: list[torch.Tensor] = []
        self.clamp_fracs: list[torch.Tensor] = []
        self.cap_fracs: list[torch.Tensor] = []
        if not self._modules and (self._clamp is not None or self._fp32):
            name = "attention_clamp" if self._clamp is not None else "attention_precision"
            raise UsageError(
                f"{name}: the model has no nn.MultiheadAttention to act on.",
                hint="Name its attention in attention_modules, or leave the setting out.",
            )
        self._attach()

    def _attach(self) -> None:
        for module in self._modules:
            if self._cap is not None and isinstance(module, nn.MultiheadAttention):
                _check_can_cap(module)
                module.forward = functools.partial(_multihead_forward, module, self)  # type: ignore[method-assign]
            if self._fp32:
                module.forward = _in_fp32(module.forward)  # type: ignore[method-assign]
            if self._clamp is not None:
                self._hooks.append(module.register_forward_hook(self._clamp_output))

    def detach(self) -> None:
        """Give the model its own attention back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self._modules:
            module.__dict__.pop("forward", None)

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Reach fused attention and `cap_logits` within this context."""
        fused = functools.partial(self._fused_attention, F.scaled_dot_product_attention)
        softmax = functools.partial(self._watched_softmax, F.softmax)
        with _replaced(self, fused, softmax):
            yield

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Give fused attention and `cap_logits` back to another model, inside `acting`."""
        fused: Callable[..., torch.Tensor] = F.scaled_dot_product_attention
        softmax: Callable[..., torch.Tensor] = F.softmax
        plain_fused = fused.args[0] if isinstance(fused, functools.partial) else fused
        plain_softmax = softmax.args[0] if isinstance(softmax, functools.partial) else softmax
        with _replaced(None, plain_fused, plain_softmax):
            yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what one forward pass shows."""
        self._is_recording, self._saw_first = True, False
        try:
            yield
        finally:
            self._is_recording = False

    def clear(self) -> None:
        """Forget what was kept, before a new window."""
        for kept in (self.logit_maxima, self.output_maxima, self.clamp_fracs, self.cap_fracs):
            kept.clear()

    def see_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Record the logits, and cap them if asked for."""
        if self._is_recording and not self._saw_first:
            self._saw_first = True
            self.logit_maxima.append(logits.detach().amax().float())
        if self._cap is None:
            return logits
        self.num_capped_calls += 1
        if self._is_recording:
            self.cap_fracs.append((logits.detach().abs() > self._cap).float().mean())
        return self._cap * torch.tanh(logits / self._cap)

    def _clamp_output(self, _module: nn.Module, _args: object, output: Any) -> Any:  # noqa: ANN401
        limit = self._clamp
        if limit is None:
            return output
        tensor = output[0] if isinstance(output, tuple) else output
        if self._is_recording:
            size = tensor.detach().abs()
            self.output_maxima.append(size.amax().float())
            self.clamp_fracs.append((size > limit).float().mean())
        clamped = tensor.clamp(-limit, limit)
        return (clamped, *output[1:]) if isinstance(output, tuple) else clamped

    def _watched_softmax(
        self,
        softmax: Callable[..., torch.Tensor],
        input: torch.Tensor,  # noqa: A002 - torch's own name
        *args: Any,  # noqa: ANN401 - passed on
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> torch.Tensor:
        # nn.MultiheadAttention with materialised weights calls this on its masked logits.
        if self._is_recording and not self._saw_first and self._is_attention_logits(input):
            self._saw_first = True
            self.logit_maxima.append(input.detach().amax().float())
        return softmax(input, *args, **kwargs)

    def _is_attention_logits(self, logits: torch.Tensor) -> bool:
        return bool(self._modules) and logits.dim() == 3  # noqa: PLR2004 - (batch*heads, L, S)

    def _fused_attention(  # noqa: PLR0913 - torch's own signature
        self,
        fused: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
        if self._cap is None:
            if self._is_recording and not self._saw_first:
                self._saw_first = True
                largest = _largest_norm(query) * _largest_norm(key) * factor
                self.logit_maxima.append(largest)
            return fused(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if enable_gqa:
            groups = query.size(-3) // key.size(-3)
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        mask = attn_mask
        if is_causal:
            shape = (query.size(-2), key.size(-2))
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)
        weights = self.attention_weights(query, key, mask, factor)
        return F.dropout(weights, dropout_p).to(value.dtype) @ value

    def attention_weights(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        factor: float,
    ) -> torch.Tensor:
        """Compute capped attention weights in fp32, so that the logits cannot overflow first.

        Args:
            query: (..., query, head width), any float dtype.
            key: (..., key, head width), the same dtype.
            mask: Added after the cap, broadcastable to (..., query, key); None for none.
            factor: Factor on the logits, usually 1 / sqrt(head width).

        Returns:
            (..., query, key), float32.
        """
        with torch.autocast(query.device.type, enabled=False):
            logits = (query.float() * factor) @ key.float().transpose(-2, -1)
            logits = self.see_logits(logits)
            if mask is not None:
                logits = logits + mask.float()
            return torch.softmax(logits, dim=-1)


@contextlib.contextmanager
def _replaced(
    guard: AttentionGuard | None,
    fused: Callable[..., torch.Tensor],
    softmax: Callable[..., torch.Tensor],
) -> Iterator[None]:
    before = F.scaled_dot_product_attention, F.softmax
    token = _active.set(guard)
    F.scaled_dot_product_attention, F.softmax = fused, softmax
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.softmax = before
        _active.reset(token)


def _largest_norm(vectors: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(vectors.detach(), dim=-1, dtype=torch.float32).amax()


def _in_fp32(forward: Callable[..., Any]) -> Callable[..., Any]:
    def to_float(value: Any) -> Any:  # noqa: ANN401 - any argument of a forward pass
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.float() if is_float else value

    def run(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as above
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return forward(
                *map(to_float, args), **{name: to_float(x) for name, x in kwargs.items()}
            )

    return run


def _check_can_cap(module: nn.MultiheadAttention) -> None:
    if module.bias_k is not None or module.add_zero_attn:
        raise UsageError(
            "attention_logit_cap: nn.MultiheadAttention with add_bias_kv or add_zero_attn cannot "
            "be capped.",
            hint="Build it without them, or leave the cap out.",
        )


def _projections(
    module: nn.MultiheadAttention,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    if module.in_proj_weight is not None:
        weights = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    bias = module.in_proj_bias
    biases = [None] * 3 if bias is None else list(bias.chunk(3))
    return zip(weights, biases, strict=True)


def _additive(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -math.inf)


def _joined_mask(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    num_heads: int,
) -> torch.Tensor | None:
    mask = _additive(attn_mask)
    if mask is not None and mask.dim() == 3:  # noqa: PLR2004 - (batch*heads, query, key)
        mask = mask.unflatten(0, (-1, num_heads))
    padding = _additive(key_padding_mask)
    if padding is None:
        return mask
    padding = padding[:, None, None, :]
    return padding if mask is None else mask + padding


def _multihead_forward(  # noqa: PLR0913 - the signature of nn.MultiheadAttention.forward
    module: nn.MultiheadAttention,
    guard: AttentionGuard,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,  # noqa: ARG001 - a hint; the mask is always given with it
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what nn.MultiheadAttention does, with capped logits."""
    inputs = (query, key, value)
    is_batched = query.dim() == 3  # noqa: PLR2004 - (batch, time, width)
    if not is_batched:
        inputs = tuple(x.unsqueeze(0 if module.batch_first else 1) for x in inputs)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if not module.batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, (weight, bias) in zip(inputs, _projections(module), strict=True)
    )
    mask = _joined_mask(attn_mask, key_padding_mask, module.num_heads)
    weights = guard.attention_weights(q, k, mask, 1 / math.sqrt(q.size(-1)))
    mixed = F.dropout(weights, module.dropout, module.training).to(v.dtype) @ v
    output = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if not module.batch_first:
        output = output.transpose(0, 1)
    if not is_batched:
        output = output.squeeze(0 if module.batch_first else 1)
    if not need_weights:
        return output, None
    shown = weights.mean(1) if average_attn_weights else weights
    return output, shown if is_batched else shown.squeeze(0)
