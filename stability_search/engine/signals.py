"""What one window shows, gathered on the device and brought to the host in one transfer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Above it a squared gradient overflows float32, and with it Adam's second moment: finite
# gradients below it cannot make the optimizer's state non-finite.
MAX_GRAD_NORM = 1e19


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The numbers of one window on the host; they may be NaN or infinite.

    Attributes:
        losses: Loss of each micro-batch, by its position in the window.
        terms: Named loss terms of each micro-batch, likewise.
        faults: What was non-finite in a forward pass or a loss, by position.
        grad_norm: Unscaled gradient norm before clipping; None if no gradient was made.
        parameter_max: Largest absolute parameter after the step.
        attention_max: Largest attention logit; None if not seen.
        clamp_frac: Mean share of attention outputs beyond the clamp; None if off.
        cap_frac: Mean share of attention logits beyond the cap; None if off.
        has_exception: True if a micro-batch raised instead of giving a loss.
    """

    losses: Mapping[int, float]
    terms: Mapping[int, Mapping[str, float]]
    faults: Mapping[int, str]
    grad_norm: float | None
    parameter_max: float
    attention_max: float | None
    clamp_frac: float | None
    cap_frac: float | None
    has_exception: bool

    @property
    def is_grad_finite(self) -> bool:
        """True unless gradients were made that are not finite or overflow when squared."""
        return self.grad_norm is None or self.grad_norm < MAX_GRAD_NORM  # False for NaN

    @property
    def are_parameters_finite(self) -> bool:
        """True if no parameter is NaN or infinite."""
        return math.isfinite(self.parameter_max)


class Signals:
    """Collect the 0-d tensors of one window."""

    def __init__(self) -> None:
        self._names: list[tuple[str, int, str]] = []
        self._values: list[torch.Tensor] = []
        self._raised: dict[int, str] = {}
        self._num_must_be_finite = 0

    def _add(self, kind: str, position: int, name: str, value: torch.Tensor) -> None:
        self._names.append((kind, position, name))
        self._values.append(value.detach().float())

    def add_loss(
        self, position: int, loss: torch.Tensor, terms: Mapping[str, torch.Tensor]
    ) -> None:
        """Keep the loss of a micro-batch and its named terms."""
        self._add("loss", position, "", loss)
        for name, term in terms.items():
            self._add("term", position, name, term)

    def add_maxima(self, position: int, kind: str, maxima: list[torch.Tensor]) -> None:
        """Keep largest values: kind `output`, `attention output` or `attention_max`."""
        for value in maxima:
            self._add(kind, position, "", value)

    def add_fracs(self, kind: str, fracs: list[torch.Tensor]) -> None:
        """Keep shares: kind `clamp_frac` or `cap_frac`."""
        for value in fracs:
            self._add(kind, 0, "", value)

    def add_exception(self, position: int, error: Exception) -> None:
        """Note that the micro-batch raised instead of giving a loss."""
        self._raised[position] = f"{type(error).__name__}: {error}".splitlines()[0]

    @property
    def has_exception(self) -> bool:
        """True if a micro-batch raised, so that no update can follow."""
        return bool(self._raised)

    def found_nonfinite(self, scaled_norm: torch.Tensor) -> torch.Tensor:
        """Say on the device whether the update must be skipped.

        Args:
            scaled_norm: Norm of the gradients as they are, 0-d.

        Returns:
            0-d float32: 1.0 if a loss, an output or the norm is not finite, else 0.0.
        """
        judged = [
            value
            for (kind, _, _), value in zip(self._names, self._values, strict=True)
            if kind in {"loss", "output", "attention output"}
        ]
        limited = torch.where(scaled_norm < MAX_GRAD_NORM, 0.0, math.nan)
        values = torch.stack([*judged, limited])
        return (~torch.isfinite(values)).any().float()

    def read(self, grad_norm: torch.Tensor | None, parameter_max: torch.Tensor) -> Reading:
        """Bring everything to the host: the one transfer of the window."""
        last = [parameter_max.float()] if grad_norm is None else [grad_norm, parameter_max.float()]
        numbers: list[float] = torch.stack([*self._values, *last]).tolist()
        found: dict[str, list[tuple[int, str, float]]] = {}
        for (kind, position, name), number in zip(self._names, numbers, strict=False):
            found.setdefault(kind, []).append((position, name, number))
        terms: dict[int, dict[str, float]] = {}
        for position, name, number in found.get("term", []):
            terms.setdefault(position, {})[name] = number
        return Reading(
            losses={position: number for position, _, number in found.get("loss", [])},
            terms=terms,
            faults=self._faults(found, terms),
            grad_norm=None if grad_norm is None else numbers[-2],
            parameter_max=numbers[-1],
            attention_max=_largest(found.get("attention_max")),
            clamp_frac=_mean(found.get("clamp_frac")),
            cap_frac=_mean(found.get("cap_frac")),
            has_exception=self.has_exception,
        )

    def _faults(
        self,
        found: Mapping[str, list[tuple[int, str, float]]],
        terms: Mapping[int, Mapping[str, float]],
    ) -> dict[int, str]:
        faults: dict[int, str] = {}
        for position, _, number in found.get("loss", []):
            if not math.isfinite(number):
                broken = (k for k, v in terms.get(position, {}).items() if not math.isfinite(v))
                term = next(broken, None)
                what = "loss" if term is None else f"loss term {term}"
                faults[position] = f"{what} is {_spell(number)}"
        for kind in ("output", "attention output"):
            for position, _, number in found.get(kind, []):
                if not math.isfinite(number):
                    subject = "model output" if kind == "output" else kind
                    faults[position] = f"{subject} is {_spell(number)}"
        return faults | self._raised


def _spell(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    return "Inf" if number > 0 else "-Inf"


def _largest(rows: list[tuple[int, str, float]] | None) -> float | None:
    return None if not rows else max(number for _, _, number in rows)


def _mean(rows: list[tuple[int, str, float]] | None) -> float | None:
    return None if not rows else sum(number for _, _, number in rows) / len(rows)
