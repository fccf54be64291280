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
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine.multihead import (
    additive,
    check_can_write_out,
    multihead_forward,
    zero_where_all_masked,
)
from stability_search.engine.overrides import Forward, ForwardOverrides
from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

_HALF = {torch.float16, torch.bfloat16}

# The guard that `cap_logits` speaks to, the innermost last. Of the process, not of a thread:
# autograd recomputes checkpointed blocks in threads of its own.
_acting: list["AttentionGuard | None"] = [None]


def cap_logits(logits: torch.Tensor) -> torch.Tensor:
    """Cap attention logits where the running configuration asks for it.

    Call it in attention of your own, before the mask is added and before the softmax; outside a
    guarded engine, or without `attention_logit_cap`, it changes nothing.

    Args:
        logits: Attention logits, any shape and float dtype; the first call of a forward pass is
            recorded as `attention_max`.

    Returns:
        c * tanh(logits / c), or the logits themselves.

    Example:
        >>> cap_logits(torch.tensor([50.0])).item()  # no engine runs, so nothing is capped
        50.0
    """
    guard = _acting[-1]
    return logits if guard is None else guard.see_logits(logits)


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
        self._modules = _attention_modules(model, settings)
        self._device_type = next(model.parameters()).device.type
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._overrides = ForwardOverrides()
        self._is_recording = False
        self._saw_first = False
        self._depth = 0
        self.num_capped_calls = 0
        self.logit_maxima: list[torch.Tensor] = []
        self.output_maxima: list[torch.Tensor] = []
        self.clamp_fracs: list[torch.Tensor] = []
        self.cap_fracs: list[torch.Tensor] = []
        self._check()
        self._attach()

    def _check(self) -> None:
        for module in self._modules:
            if self._cap is not None and isinstance(module, nn.MultiheadAttention):
                check_can_write_out(module)
            halves = {p.dtype for p in module.parameters()} & _HALF
            if self._fp32 and halves:
                raise UsageError(
                    "attention_precision: fp32 needs fp32 attention weights, but frozen ones of "
                    f"{type(module).__name__} are stored in {str(halves.pop())[6:]}.",
                    hint="Load them in fp32, or leave attention_precision at trial.",
                )

    def _attach(self) -> None:
        for module in self._modules:
            if self._cap is not None and isinstance(module, nn.MultiheadAttention):
                self._overrides.replace(module, functools.partial(self._capped, module))
            else:
                self._overrides.replace(module, self._watched)
            if self._fp32:
                self._overrides.replace(
                    module, functools.partial(functools.partial, _run_in_fp32, self._device_type)
                )
            if self._clamp is not None:
                self._hooks.append(module.register_forward_hook(self._clamp_output))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Stay one guard where a model is copied: the copy is capped as the model is."""
        return self

    def _capped(self, module: nn.MultiheadAttention, _: Forward) -> Forward:
        # Partials, not closures: a copied model must not compute with the weights of this one.
        return functools.partial(multihead_forward, module, self.attention_weights)

    def _watched(self, forward: Forward) -> Forward:
        return functools.partial(self._note_depth, forward)

    def detach(self) -> None:
        """Give the model its own attention back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._overrides.undo()

    # -- reach -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Reach fused attention and `cap_logits` within this context."""
        fused = functools.partial(self._fused_attention, _plain(F.scaled_dot_product_attention))
        softmax = functools.partial(self._watched_softmax, _plain(F.softmax))
        with _replaced(self, fused, softmax), _no_fast_path(applies=self._cap is not None):
            yield

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Give fused attention and `cap_logits` back to another model, inside `acting`."""
        with _replaced(None, _plain(F.scaled_dot_product_attention), _plain(F.softmax)):
            yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what one forward pass shows."""
        for kept in (self.logit_maxima, self.output_maxima, self.clamp_fracs, self.cap_fracs):
            kept.clear()
        self._is_recording, self._saw_first = True, False
        try:
            yield
        finally:
            self._is_recording = False

    # -- what acts ---------------------------------------------------------------------------

    def see_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Record the logits, and cap them if asked for."""
        self._note_logits(lambda: logits.detach().abs().amax())
        if self._cap is None:
            return logits
        self.num_capped_calls += 1
        if self._is_recording:
            self.cap_fracs.append((logits.detach().abs() > self._cap).float().mean())
        return self._cap * torch.tanh(logits / self._cap)

    def _note_logits(self, largest: Callable[[], torch.Tensor]) -> None:
        if self._is_recording and not self._saw_first:
            self._saw_first = True
            self.logit_maxima.append(largest().float())

    def _clamp_output(self, module: nn.Module, _args: object, output: Any) -> Any:  # noqa: ANN401
        limit = self._clamp
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, torch.Tensor) or limit is None:
            raise UsageError(
                f"attention_clamp: {type(module).__name__} must return a tensor, or a tuple that "
                f"begins with one, but returned {type(tensor).__name__}.",
                hint="Leave it out of attention_modules.",
            )
        if self._is_recording:
            size = tensor.detach().abs()
            self.output_maxima.append(size.amax().float())
            self.clamp_fracs.append((size > limit).float().mean())
        clamped = tensor.clamp(-limit, limit)
        return (clamped, *output[1:]) if isinstance(output, tuple) else clamped

    def _note_depth(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._depth -= 1

    def _watched_softmax(
        self,
        softmax: Callable[..., torch.Tensor],
        input: torch.Tensor,  # noqa: A002 - torch's own name
        *args: Any,  # noqa: ANN401 - passed on
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> torch.Tensor:
        # Attention with materialised weights calls this on logits that hold the mask already, so
        # only their largest value, not their largest size, can be told.
        if self._depth:
            self._note_logits(lambda: input.detach().amax())
        return softmax(input, *args, **kwargs)

    def _fused_attention(  # noqa: PLR0913, PLR0917 - torch's own signature
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
            self._note_logits(lambda: _largest_norm(query) * _largest_norm(key) * abs(factor))
            kwargs = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
            return fused(query, key, value, **kwargs, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa:
            groups = query.size(-3) // key.size(-3)
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
        mask = additive(~attn_mask) if is_bool and attn_mask is not None else attn_mask
        if is_causal:
            shape = (query.size(-2), key.size(-2))
            hidden = torch.ones(shape, dtype=torch.bool, device=query.device).triu(1)
            mask = additive(hidden) if mask is None else mask.masked_fill(hidden, -math.inf)
        weights = self.attention_weights(query, key, mask, factor)
        weights = zero_where_all_masked(weights, mask)
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
            (..., query, key), float32, or float64 for float64.
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            logits = (query.to(dtype) * factor) @ key.to(dtype).transpose(-2, -1)
            logits = self.see_logits(logits)
            if mask is not None:
                logits = logits + mask.to(dtype)
            return torch.softmax(logits, dim=-1)


def _attention_modules(model: nn.Module, settings: EngineSettings) -> list[nn.Module]:
    patterns = settings.attention_modules
    if patterns:
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
    found = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    asked = {
        "attention_clamp": settings.attention_clamp is not None,
        "attention_precision": settings.attention_precision == "fp32",
    }
    missed = [name for name, is_asked in asked.items() if is_asked]
    if missed and not found:
        raise UsageError(
            f"{missed[0]}: the model has no nn.MultiheadAttention to act on.",
            hint="Name its attention in attention_modules, or leave the setting out.",
        )
    return found


@contextlib.contextmanager
def _replaced(
    guard: AttentionGuard | None,
    fused: Callable[..., torch.Tensor],
    softmax: Callable[..., torch.Tensor],
) -> Iterator[None]:
    before = F.scaled_dot_product_attention, F.softmax
    _acting.append(guard)
    F.scaled_dot_product_attention, F.softmax = fused, softmax
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.softmax = before
        _acting.pop()


@contextlib.contextmanager
def _no_fast_path(*, applies: bool) -> Iterator[None]:
    # In eval mode nn.TransformerEncoderLayer passes its attention module by.
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(was_enabled and not applies)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _plain(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return what an engine around this one has replaced."""
    while isinstance(function, functools.partial) and isinstance(
        getattr(function.func, "__self__", None), AttentionGuard
    ):
        function = function.args[0]
    return function


def _largest_norm(vectors: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(vectors.detach(), dim=-1, dtype=torch.float32)
    return norms.amax()


def _run_in_fp32(
    device_type: str,
    forward: Forward,
    *args: Any,  # noqa: ANN401 - the module's own
    **kwargs: Any,  # noqa: ANN401 - the module's own
) -> Any:  # noqa: ANN401 - the module's own
    with torch.autocast(device_type, enabled=False):
        return forward(*map(_to_float, args), **{name: _to_float(x) for name, x in kwargs.items()})


def _to_float(value: Any) -> Any:  # noqa: ANN401 - any argument of a forward pass
    is_half = isinstance(value, torch.Tensor) and value.dtype in _HALF
    return value.float() if is_half else value
