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

from stability_search.engine.half_weights import HALF
from stability_search.engine.multihead import (
    additive,
    check_can_write_out,
    multihead_forward,
    zero_where_all_masked,
)
from stability_search.engine.observer import Observer
from stability_search.engine.overrides import Forward, ForwardOverrides
from stability_search.engine.reach import ReachWatch
from stability_search.engine.standins import Functions, Reach, in_place_of, plain, plain_one
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings

_WAYS_TO_CAP = (
    'Load a Hugging Face model with attn_implementation="sdpa"; elsewhere call '
    "torch.nn.functional.scaled_dot_product_attention by that name, or "
    "stability_search.cap_logits on the logits before the mask; or leave the cap out."
)

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


def check_attention(model: nn.Module, settings: EngineSettings) -> None:
    """Refuse attention settings that the model has nothing for, before anything is changed.

    Raises:
        UsageError: As `AttentionGuard`.
    """
    for module in _attention_modules(model, settings):
        if settings.attention_logit_cap is not None and isinstance(module, nn.MultiheadAttention):
            check_can_write_out(module)


class AttentionGuard:
    """Clamp, cap and watch the attention of one model.

    Args:
        model: The model; its attention modules are changed until `detach`.
        settings: `attention_*` settings.
        observer: Reads what the attention shows.

    Raises:
        UsageError: A clamp or fp32 attention is asked for and no attention module is found, or
            the cap meets an attention module it cannot compute. The first forward pass that is
            recorded raises it too: for attention that the cap did not reach, and for attention
            modules that did not run.
    """

    def __init__(self, model: nn.Module, settings: EngineSettings, observer: Observer) -> None:
        self._observer = observer
        self._settings = settings
        self._clamp = settings.attention_clamp
        self._cap = settings.attention_logit_cap
        self._fp32 = settings.attention_precision == "fp32"
        self._model = model
        self._patterns = settings.attention_modules
        self._modules = _attention_modules(model, settings)
        self._device = next(model.parameters()).device
        self._overrides = ForwardOverrides()
        self._must_check_reach = self._cap is not None or self._clamp is not None or self._fp32
        self._ran: set[nn.Module] = set()
        self._reach = Reach(_acting, self, self._stand_ins)
        self._recording = _Recording(self)
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
        check_attention(self._model, self._settings)
        for module in self._modules:
            halves = {p.dtype for p in module.parameters()} & HALF
            if self._fp32 and halves:
                raise UsageError(
                    "attention_precision: fp32 needs fp32 attention weights, but frozen ones of "
                    f"{type(module).__name__} are stored in {str(halves.pop())[6:]}.",
                    hint="Load them in fp32, or leave attention_precision at trial.",
                )

    def _attach(self) -> None:
        # Partials, not closures: a copied model must not compute with the weights of this one.
        for module in self._modules:
            if self._cap is not None and isinstance(module, nn.MultiheadAttention):
                self._overrides.replace(module, functools.partial(self._capped, module))
            if self._fp32:
                self._overrides.replace(
                    module, functools.partial(functools.partial, _run_in_fp32, self._device.type)
                )
            self._overrides.replace(
                module, functools.partial(functools.partial, self._watched, module)
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Stay one guard where a model is copied: the copy is capped as the model is."""
        return self

    def _capped(self, module: nn.MultiheadAttention, _: Forward) -> Forward:
        return functools.partial(multihead_forward, module, self.attention_weights)

    def detach(self) -> None:
        """Give the model its own attention back."""
        self._overrides.undo()

    # -- reach -------------------------------------------------------------------------------

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Reach fused attention and `cap_logits` within this context."""
        return self._reach

    def suspended(self) -> contextlib.AbstractContextManager[None]:
        """Give fused attention and `cap_logits` back to another model, inside `acting`."""
        return Reach(_acting, None, plain)

    def _stand_ins(self, found: Functions) -> Functions:
        fused, softmax = found
        return (
            in_place_of(fused, self._fused_attention),
            in_place_of(softmax, self._watched_softmax),
        )

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Keep what one forward pass shows; the first must show that the settings act.

        Raises:
            UsageError: They do not, on all attention they are for.
        """
        return self._checking_reach() if self._must_check_reach else self._recording

    def start_recording(self) -> None:
        """Forget the last forward pass, and keep what is seen from now on."""
        for kept in (self.logit_maxima, self.output_maxima, self.clamp_fracs, self.cap_fracs):
            kept.clear()
        self._is_recording, self._saw_first = True, False

    def stop_recording(self) -> None:
        """Keep nothing more."""
        self._is_recording = False

    @contextlib.contextmanager
    def _checking_reach(self) -> Iterator[None]:
        self._ran.clear()
        watch = ReachWatch(
            plain_one(F.scaled_dot_product_attention),
            count_capped=lambda: self.num_capped_calls,
            is_watching=lambda: _acting[-1] is self,
            inside=self._modules if self._patterns else (),
        )
        with contextlib.ExitStack() as watching:
            if self._cap is not None:
                # A compiled model would be compiled around the watch, to be compiled again.
                watching.enter_context(torch.compiler.set_stance("force_eager"))
                watching.enter_context(watch)
            with self._recording:
                yield
        if self._cap is not None:
            self._require_cap_acted(watch, self._cap)
        if self._clamp is not None or self._fp32:
            self._require_modules_ran()
        self._must_check_reach = False

    def _require_cap_acted(self, watch: ReachWatch, cap: float) -> None:
        ways = "nn.MultiheadAttention, scaled_dot_product_attention or cap_logits"
        if watch.missed is not None:
            module, what = watch.missed
            raise UsageError(
                f"attention_logit_cap: all attention must go through {ways} for a cap of {cap:g} "
                f"to act, but {self._name(module)} {what}.",
                hint=f"{_WAYS_TO_CAP} To cap a part on purpose, name it in attention_modules.",
            )
        if self.num_capped_calls == 0:
            raise UsageError(
                f"attention_logit_cap: a cap of {cap:g} needs attention to act on, but no "
                f"attention of the model went through {ways}.",
                hint=_WAYS_TO_CAP,
            )

    def _require_modules_ran(self) -> None:
        setting = "attention_precision" if self._clamp is None else "attention_clamp"
        named = {m: name for name, m in self._model.named_modules() if m in set(self._modules)}
        for pattern in self._patterns or ("*",):
            meant = {m: n for m, n in named.items() if fnmatch.fnmatchcase(n, pattern)}
            if not self._ran.intersection(meant):
                raise UsageError(
                    f"{setting}: it acts where attention modules run, but the model did not call "
                    f"{', '.join(list(meant.values())[:3])}.",
                    hint="Name the modules that it calls in attention_modules, or leave it out.",
                )

    def _name(self, module: nn.Module | None) -> str:
        if module is None:
            return "the loss"
        names = {m: name for name, m in self._model.named_modules()}
        name, kind = names.get(module, ""), type(module).__name__
        return f"{name} ({kind})" if name else kind

    # -- what acts ---------------------------------------------------------------------------

    def see_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Record the logits, and cap them if asked for."""
        if logits.numel():
            self._note_logits(lambda: logits.detach().abs().amax())
        if self._cap is None:
            return logits
        limit = self._cap
        self.num_capped_calls += 1
        if self._is_recording and logits.numel():
            self._keep(self.cap_fracs, lambda: _share_beyond(logits, limit))
        return self._cap * torch.tanh(logits / self._cap)

    def _note_logits(self, largest: Callable[[], torch.Tensor]) -> None:
        if self._is_recording and not self._saw_first:
            self._saw_first = True
            self._keep(self.logit_maxima, lambda: largest().float())

    def _keep(self, kept: list[torch.Tensor], read: Callable[[], torch.Tensor]) -> None:
        nothing: list[torch.Tensor] = []
        found = self._observer.look("model's attention", lambda: [read()], nothing)
        kept += self._observer.on_device("model's attention", found, self._device)

    def _watched(
        self,
        module: nn.Module,
        forward: Forward,
        *args: Any,  # noqa: ANN401 - the module's own
        **kwargs: Any,  # noqa: ANN401 - the module's own
    ) -> Any:  # noqa: ANN401 - the module's own
        if self._must_check_reach:
            self._ran.add(module)
        self._depth += 1
        try:
            output = forward(*args, **kwargs)
        finally:
            self._depth -= 1
        return output if self._clamp is None else self._clamped(module, output, self._clamp)

    def _clamped(self, module: nn.Module, output: Any, limit: float) -> Any:  # noqa: ANN401
        tensor = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(tensor, torch.Tensor):
            raise UsageError(
                f"attention_clamp: {self._name(module)} must return a tensor, or a tuple that "
                f"begins with one, but returned {type(tensor).__name__}.",
                hint="Leave it out of attention_modules.",
            )
        if self._is_recording and tensor.numel():
            self._keep(self.output_maxima, lambda: tensor.detach().abs().amax().float())
            self._keep(self.clamp_fracs, lambda: _share_beyond(tensor, limit))
        limit = min(limit, torch.finfo(tensor.dtype).max)  # torch refuses a bound beyond it
        clamped = tensor.clamp(-limit, limit)
        if not isinstance(output, tuple):
            return clamped
        rest = output[1:]
        is_named = hasattr(output, "_fields")
        return type(output)(clamped, *rest) if is_named else (clamped, *rest)

    def _watched_softmax(
        self,
        softmax: Callable[..., torch.Tensor],
        input: torch.Tensor,  # noqa: A002 - torch's own name
        *args: Any,  # noqa: ANN401 - passed on
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> torch.Tensor:
        # Attention with materialised weights calls this on logits that hold the mask already, so
        # only their largest value, not their largest size, can be told.
        if self._depth and input.numel():
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
            if query.numel() and key.numel():
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
    if settings.attention_modules:
        return _named_modules(model, settings.attention_modules)
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    asked = {
        "attention_clamp": settings.attention_clamp is not None,
        "attention_precision": settings.attention_precision == "fp32",
    }
    missed = [name for name, is_asked in asked.items() if is_asked]
    if missed and not found:
        value = getattr(settings, missed[0])
        raise UsageError(
            f"{missed[0]}: {value} needs attention modules to act on, but the model has no "
            "nn.MultiheadAttention.",
            hint='Name its attention in attention_modules (Hugging Face: ["*.self_attn"] or '
            '["*.attn"]), or leave the setting out.',
        )
    return found


def _named_modules(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for pattern in patterns:
        meant = [m for n, m in model.named_modules() if fnmatch.fnmatchcase(n, pattern)]
        # Nobody calls a list of modules, so nothing could act there.
        called = [m for m in meant if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]
        if not called:
            kind = "only lists of modules match" if meant else "no module of the model matches"
            raise UsageError(
                f"attention_modules: every pattern must match attention, but {kind} {pattern}.",
                hint="Compare with the names of model.named_modules().",
            )
        found |= dict.fromkeys(called)
    return list(found)


class _Recording:
    """Let a guard keep what it sees while a `with` block runs; written out as `Reach` is."""

    def __init__(self, guard: AttentionGuard) -> None:
        self._guard = guard

    def __enter__(self) -> None:
        self._guard.start_recording()

    def __exit__(self, *_: object) -> None:
        self._guard.stop_recording()


def _share_beyond(values: torch.Tensor, limit: float) -> torch.Tensor:
    return (values.detach().abs() > limit).float().mean()


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
    """Turn half-precision tensors into fp32, also in tuples, lists and dicts, however nested."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in HALF else value
    if type(value) is dict:
        made: Any = {key: _to_float(part) for key, part in value.items()}
        is_changed = any(made[key] is not part for key, part in value.items())
    elif isinstance(value, tuple) or type(value) is list:
        parts = [_to_float(part) for part in value]
        is_changed = any(one is not other for one, other in zip(parts, value, strict=True))
        made = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    else:
        return value
    return made if is_changed else value  # what a module writes into must stay itself
