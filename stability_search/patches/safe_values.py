"""The values of a safe `GradScaler`: first scale, growth interval, limits, and what is said."""

import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.amp import GradScaler

from stability_search.patches.messages import Level, Messages
from stability_search.patches.settings import PatchSettings, variable

_LARGEST = torch.finfo(torch.float32).max
_ADVICE = "Reduce the learning rate, or leave fp16 for bf16 or fp32."


class SafeValues:
    """What a `GradScaler` is given, and where its scale may go.

    Args:
        settings: The values.
        messages: Where changes are said.
    """

    def __init__(self, settings: PatchSettings, messages: Messages) -> None:
        self._settings = settings
        self._messages = messages
        self._num_floors = 0

    def wrapped(self, init: Callable[..., None]) -> Callable[..., None]:
        """Return a constructor with safe values; the script's own are kept unless asked for."""
        signature = inspect.signature(init)

        @functools.wraps(init)
        def safe(scaler: GradScaler, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as PyTorch's
            values, words = kwargs, args
            notes: list[str] = []
            with self._messages.survives("values of GradScaler"):
                caller = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001 - who asks
                is_of_torch = str(caller).startswith("torch.")
                given = _given(signature, scaler, args, kwargs, is_of_torch=is_of_torch)
                if given is not None:
                    words, (values, notes) = (), self._safe(signature, given)
            init(scaler, *words, **values)
            if notes and scaler.is_enabled():
                self._messages.release()
                self._messages.say(Level.INFO, f"GradScaler was made: {'; '.join(notes)}")

        return safe

    def within(self, scale: float) -> float:
        """Return the scale within its limits."""
        high = self._settings.max_scale
        return max(self._settings.min_scale, scale if high is None else min(scale, high))

    def say_change(self, step: int, before: float, plan: float, after: float) -> None:
        """Say how the scale changed, or that it should have.

        Args:
            step: The step after which it changed.
            before: Scale of that step.
            plan: What PyTorch makes of it.
            after: What it is.
        """
        change = f"step {step}: loss scale {before:g} -> {after:g}"
        if plan < 1 and plan < before:
            self._num_floors += 1
            if self._num_floors & (self._num_floors - 1) == 0:  # the 1st, 2nd, 4th, ...
                kept = f", as its limit is {after:g}" if after > plan else ""
                self._messages.say(
                    Level.CRITICAL,
                    f"{change}: gradient overflow (NaN or Inf) asks for {plan:g}, below 1{kept}. "
                    f"{_ADVICE}",
                )
        elif after < before and plan >= before:
            self._messages.say(Level.INFO, f"{change}, which is the limit that was set")
        elif after < before:
            self._messages.say(Level.WARNING, f"{change} (gradient overflow, NaN or Inf)")
        elif after > before:
            self._messages.say(Level.INFO, f"{change} (growth)")

    def _safe(
        self, signature: inspect.Signature, given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Return the arguments to use, and what is said of them."""
        used, notes = dict(given), []
        asked = {
            "init_scale": (self._settings.init_scale, self._settings.first_scale),
            "growth_interval": (self._settings.growth_interval, self._settings.interval),
        }
        for name, (wanted, safe) in asked.items():
            own = given.get(name)
            if own is not None and wanted is None:
                kept = f"is the script's own and is kept ({variable(name)} replaces it)"
                notes.append(f"{name} {own:g} {kept}")
                continue
            used[name] = safe
            replaced = signature.parameters[name].default if own is None else own
            notes.append(f"{name} {safe:g} instead of {replaced:g}")
        first = self.within(float(used["init_scale"]))
        if first != used["init_scale"]:
            notes.append(f"init_scale {first:g}, which is the limit that was set")
            used["init_scale"] = first
        notes.append(f"never below {self._settings.min_scale:g}")
        return used, notes


def next_scale(scaler: GradScaler, scale: float, num_good: int, *, has_overflowed: bool) -> float:
    """Return what PyTorch makes of a loss scale after a step.

    Args:
        scaler: Its factors and its interval are used.
        scale: Scale of the step.
        num_good: Good steps since the scale last changed, before this one.
        has_overflowed: True if a gradient was not finite.

    Source:
        `torch._amp_update_scale_`.
    """
    if has_overflowed:
        return scale * scaler.get_backoff_factor()
    if num_good + 1 < scaler.get_growth_interval():
        return scale
    grown = scale * scaler.get_growth_factor()
    return grown if math.isfinite(grown) and grown <= _LARGEST else scale


def _given(
    signature: inspect.Signature,
    scaler: GradScaler,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_of_torch: bool,
) -> dict[str, Any] | None:
    """Return what a constructor was given by name; None if PyTorch will refuse it.

    PyTorch's own subclasses pass every default on, which is no wish of the script.
    """
    try:
        bound = signature.bind(scaler, *args, **kwargs).arguments
    except TypeError:
        return None
    return {
        name: value
        for name, value in list(bound.items())[1:]
        if not (is_of_torch and value == signature.parameters[name].default)
    }
