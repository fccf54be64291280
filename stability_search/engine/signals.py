"""What one window shows, gathered on the device and brought to the host in one transfer."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

# From here on a squared gradient may overflow float32, and with it Adam's second moment: finite
# gradients below it cannot make the optimizer's state non-finite. A power of two, so that device
# and host agree on it to the bit.
MAX_GRAD_NORM = 2.0**63
_TO_OVERFLOW = 2.0**128 / MAX_GRAD_NORM  # times it, float32 overflows exactly from there on
_MAX_REASON_LENGTH = 200
# Kinds that must be finite, the later the closer to the cause.
_JUDGED = ("loss", "output", "attention output")
STATISTICS = "running statistic of a norm"  # must be finite too, and is no micro-batch's own

_Row = tuple[int, str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """The numbers of one window on the host; they may be NaN or infinite.

    Attributes:
        losses: Loss of each micro-batch, by its position in the window.
        terms: Named loss terms of each micro-batch, likewise.
        faults: What was non-finite in a forward pass or a loss, by position.
        grad_norm: Unscaled gradient norm before clipping; None if no gradient was made.
        is_grad_finite: False if gradients were made that are not finite or overflow when
            squared. The device skipped the update exactly then, or where there are faults.
        state_norm: L2 norm over parameters and second moments after the step.
        attention_max: Largest attention logit; None if not seen.
        clamp_frac: Mean share of attention outputs beyond the clamp; None if off.
        cap_frac: Mean share of attention logits beyond the cap; None if off.
        update_ratio: RMS of the update over RMS of the weights, of the matrix looked at; None if
            none was.
        zero_grad_frac: Share of exact zeros in the gradient of that matrix; None likewise.
        grad_norms: L2 norm of each gradient with the loss scale, before clipping; empty where
            they were not kept.
    """

    losses: Mapping[int, float]
    terms: Mapping[int, Mapping[str, float]]
    faults: Mapping[int, str]
    grad_norm: float | None
    is_grad_finite: bool
    state_norm: float
    attention_max: float | None
    clamp_frac: float | None
    cap_frac: float | None
    update_ratio: float | None
    zero_grad_frac: float | None
    grad_norms: tuple[float, ...]


class Signals:
    """Collect the 0-d tensors of one window."""

    def __init__(self) -> None:
        self._names: list[tuple[str, int, str]] = []
        self._values: list[torch.Tensor] = []
        self._judged: list[torch.Tensor] = []
        self._raised: dict[int, str] = {}
        self._grad: tuple[torch.Tensor, ...] = ()
        self._grad_norms: torch.Tensor | None = None

    def add(self, kind: str, position: int, values: Iterable[torch.Tensor]) -> None:
        """Keep 0-d values of a micro-batch: losses, largest values or shares.

        Args:
            kind: `loss`, `output`, `attention output` or `STATISTICS`, which must be finite, or
                the name of a field of `Reading`.
            position: Position of the micro-batch in the window; 0 for what belongs to none.
            values: Any number of them, float32 and without a graph behind them.
        """
        for value in values:
            self._keep(kind, position, "", value)

    def add_terms(self, position: int, terms: Mapping[str, torch.Tensor]) -> None:
        """Keep the named loss terms of a micro-batch, each of one element."""
        for name, term in terms.items():
            self._keep("term", position, name, term.detach().reshape(()).float())

    def add_exception(self, position: int, error: Exception) -> None:
        """Note that the micro-batch raised instead of giving a loss."""
        self._raised[position] = spell_error(error)

    def _keep(self, kind: str, position: int, name: str, value: torch.Tensor) -> None:
        self._names.append((kind, position, name))
        self._values.append(value)
        if kind in _JUDGED or kind == STATISTICS:
            self._judged.append(value)

    def _all_faults(
        self, found: Mapping[str, Sequence[_Row]], terms: Mapping[int, Mapping[str, float]]
    ) -> dict[int, str]:
        faults = _faults(found, terms) | self._raised
        if faults:
            return faults  # whose doing the statistics are
        return {
            position: f"a {STATISTICS} is NaN or Inf"
            for position, _, number in found.get(STATISTICS, ())
            if not math.isfinite(number)
        }

    @property
    def has_exception(self) -> bool:
        """True if a micro-batch raised, so that no update can follow."""
        return bool(self._raised)

    def found_nonfinite(self, scaled_norm: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Say on the device whether the update must be skipped.

        Args:
            scaled_norm: Norm of the gradients as they are, 0-d.
            norm: The same without the loss scale, 0-d.

        Returns:
            0-d float32: 1.0 if a loss, an output or the norm is not finite, else 0.0.
        """
        self._grad = (scaled_norm.float(), norm.float())
        distinct = self._grad[:1] if norm is scaled_norm else self._grad
        limited = [value * _TO_OVERFLOW for value in distinct]
        # Few small kernels: 0 times a finite number is 0, and times any other NaN.
        judged = torch.stack([*self._judged, *limited])
        return torch.dot(judged, torch.zeros_like(judged)).nan_to_num_(nan=1.0)

    def add_grad_norms(self, norms: torch.Tensor) -> None:
        """Keep the norm of each gradient as it is, one dimension."""
        self._grad_norms = norms.float()

    def read(self, state_norm: torch.Tensor) -> Reading:
        """Bring everything to the host: the one transfer of the window."""
        packed = torch.stack([*self._values, *self._grad, state_norm.float()])
        num_own = len(packed)
        if self._grad_norms is not None:
            packed = torch.cat([packed, self._grad_norms])
        numbers: list[float] = packed.tolist()
        numbers, grad_norms = numbers[:num_own], numbers[num_own:]
        found: dict[str, list[_Row]] = {}
        for (kind, position, name), number in zip(self._names, numbers, strict=False):
            found.setdefault(kind, []).append((position, name, number))
        terms: dict[int, dict[str, float]] = {}
        for position, name, number in found.get("term", ()):
            terms.setdefault(position, {})[name] = number
        return Reading(
            losses={position: number for position, _, number in found.get("loss", ())},
            terms=terms,
            faults=self._all_faults(found, terms),
            grad_norm=numbers[-2] if self._grad else None,
            # False for NaN
            is_grad_finite=not self._grad or all(x < MAX_GRAD_NORM for x in numbers[-3:-1]),
            state_norm=numbers[-1],
            attention_max=_largest(found.get("attention_max", ())),
            clamp_frac=_mean(found.get("clamp_frac", ())),
            cap_frac=_mean(found.get("cap_frac", ())),
            update_ratio=_mean(found.get("update_ratio", ())),
            zero_grad_frac=_mean(found.get("zero_grad_frac", ())),
            grad_norms=tuple(grad_norms),
        )


def _faults(
    found: Mapping[str, Sequence[_Row]], terms: Mapping[int, Mapping[str, float]]
) -> dict[int, str]:
    faults: dict[int, str] = {}
    for kind in _JUDGED:
        subject = "model output" if kind == "output" else kind
        for position, _, number in found.get(kind, ()):
            if math.isfinite(number):
                continue
            what = f"{subject} is {_spell(number)}"
            for name, term in terms.get(position, {}).items():
                if not math.isfinite(term):
                    named = f"loss term {name} is {_spell(term)}"
                    what = named if kind == "loss" else f"{what}, {named}"
                    break
            faults[position] = what
    return faults


def spell_error(error: Exception) -> str:
    """Return an exception as one short line."""
    name = type(error).__name__.lstrip("_")  # torch's LinAlgError is called _LinAlgError
    lines = f"{name}: {error}".strip().splitlines()
    return lines[0].rstrip(": ")[:_MAX_REASON_LENGTH]


def _spell(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    return "Inf" if number > 0 else "-Inf"


def _largest(rows: Sequence[_Row]) -> float | None:
    numbers = [number for _, _, number in rows]
    if any(math.isnan(number) for number in numbers):
        return math.nan  # max() would hide it or not, by its place
    return max(numbers, default=None)


def _mean(rows: Sequence[_Row]) -> float | None:
    return None if not rows else sum(number for _, _, number in rows) / len(rows)
