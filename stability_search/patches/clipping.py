"""Gradient clipping: by the norm of the *unscaled* gradients, and never by one that is not finite.

PyTorch clips what it finds. Gradients that still carry the loss scale are then always clipped, a
hidden cut of the learning rate; and a norm of Inf writes NaN into every gradient.
"""

import functools
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad

from stability_search.patches.messages import Level
from stability_search.patches.monitor import Monitor
from stability_search.patches.replacing import Replacements
from stability_search.patches.window import ClippedNorm, grad_norm

_L2 = 2.0
_SCALED = (
    "gradient clipping was called before `scaler.unscale_`: the norm of the unscaled gradients is "
    "clipped instead. Without this patch it acts on every step and cuts the learning rate."
)

ScaleOf = Callable[[Sequence[torch.Tensor]], torch.Tensor | None]
"""Returns the loss scale that the gradients of these parameters carry; None if they carry none."""


class Clipping:
    """Both clipping functions.

    Args:
        monitor: Hears of the norms.
        scale_of: Says which loss scale gradients carry.
    """

    def __init__(self, monitor: Monitor, scale_of: ScaleOf) -> None:
        self._monitor = monitor
        self._scale_of = scale_of
        self._norm = clip_grad.clip_grad_norm_
        self._value = clip_grad.clip_grad_value_

    def put_in(self, replacements: Replacements) -> None:
        """Replace the names."""

        @functools.wraps(self._norm)
        def clip_grad_norm_(
            parameters: torch.Tensor | Iterable[torch.Tensor],
            max_norm: float,
            norm_type: float = _L2,
            error_if_nonfinite: bool = False,
            foreach: bool | None = None,
        ) -> torch.Tensor:
            listed = _listed(parameters)
            if self._monitor.settings.observe or not _is_plain(listed):
                again = _empty_as_given(parameters, listed)
                norm = self._norm(again, max_norm, norm_type, error_if_nonfinite, foreach)
                # A scaled norm is not that of the gradients, one split over processes not plain.
                if self._scale(listed) is None and _is_plain(listed):
                    self._note(listed, norm, max_norm, norm_type)
                return norm
            gradients = [p.grad for p in listed if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients, norm_type, error_if_nonfinite, foreach)
            scale = self._scale(listed)
            if scale is not None:
                self._monitor.messages.once("clip scaled", Level.WARNING, _SCALED)
                norm = norm / scale.to(norm.device)
            # Decided on the device. By a norm of 0 nothing is clipped: NaN and Inf stay where
            # they are, and the step is judged by them.
            safe = torch.nan_to_num(norm, nan=0.0, posinf=0.0)
            nn.utils.clip_grads_with_norm_(listed, max_norm, safe, foreach)
            self._note(listed, norm, max_norm, norm_type)
            return norm

        @functools.wraps(self._value)
        def clip_grad_value_(
            parameters: torch.Tensor | Iterable[torch.Tensor],
            clip_value: float,
            foreach: bool | None = None,
        ) -> None:
            listed = _listed(parameters)
            scale = self._scale(listed) if _is_plain(listed) else None
            if _is_plain(listed):
                # Clipping turns Inf into the largest value left: measured before, it is seen.
                self._note_norm_before(listed, scale)
            if scale is not None and not self._monitor.settings.observe:
                self._monitor.messages.once("clip scaled", Level.WARNING, _SCALED)
                clip_value = clip_value * float(scale)
            self._value(_empty_as_given(parameters, listed), clip_value, foreach)

        for owner in (clip_grad, nn.utils):
            replacements.put(owner, "clip_grad_norm_", clip_grad_norm_)
            replacements.put(owner, "clip_grad_value_", clip_grad_value_)

    def _scale(self, listed: Sequence[torch.Tensor]) -> torch.Tensor | None:
        if self._monitor.window.scaler is None:
            return None
        with self._monitor.messages.survives("loss scale while clipping"):
            return self._scale_of(listed)
        return None

    def _note(
        self, listed: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float, kind: float
    ) -> None:
        with self._monitor.messages.survives("norm while clipping"):
            if kind == _L2:
                self._add(listed, norm, float(max_norm))

    def _note_norm_before(
        self, listed: Sequence[torch.Tensor], scale: torch.Tensor | None
    ) -> None:
        with self._monitor.messages.survives("norm while clipping"):
            norm = grad_norm([p for p in listed if p.grad is not None])
            self._add(listed, norm if scale is None else norm / scale.to(norm.device), None)

    def _add(
        self, listed: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float | None
    ) -> None:
        ids = frozenset(map(id, listed))
        self._monitor.window.add_clipped(
            ClippedNorm(
                parameters=ids,
                norm=norm.detach(),
                max_norm=max_norm,
                is_unscaled=not self._monitor.window.is_mixed,
            )
        )


def _listed(parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _is_plain(listed: Sequence[torch.Tensor]) -> bool:
    """Return True if there is a gradient, and each is a tensor of this process alone."""
    gradients = [p.grad for p in listed if p.grad is not None]
    return bool(gradients) and all(type(gradient) is torch.Tensor for gradient in gradients)


def _empty_as_given(
    parameters: torch.Tensor | Iterable[torch.Tensor], listed: list[torch.Tensor]
) -> Any:  # noqa: ANN401 - what PyTorch takes
    """Return the list; an empty generator stays one, of which PyTorch warns."""
    if not listed and isinstance(parameters, types.GeneratorType):
        return (p for p in listed)
    return listed
