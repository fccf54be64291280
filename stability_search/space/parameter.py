"""One setting that varies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from stability_search.records.values import Scalar
from stability_search.space.setting_values import normalised

ParameterKind: TypeAlias = Literal["choice", "uniform", "loguniform", "int", "logint"]
KINDS: tuple[ParameterKind, ...] = ("choice", "uniform", "loguniform", "int", "logint")


def same_value(left: object, right: object) -> bool:
    """Compare as YAML does: 1 equals 1.0, but true is not 1."""
    return isinstance(left, bool) == isinstance(right, bool) and left == right


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A setting that varies, and where it may go.

    Attributes:
        name: The setting.
        kind: `choice`; `uniform` or `loguniform` for numbers, `int` or `logint` for integers.
        choices: Values of a `choice`, in the order of the file; empty otherwise.
        low: Smallest value of a range, included; 0 for a `choice`.
        high: Largest value of a range, included; 0 for a `choice`.
        when: Values that each named setting must have for this one to apply; empty: always.
    """

    name: str
    kind: ParameterKind
    choices: tuple[Scalar, ...] = ()
    low: float = 0.0
    high: float = 0.0
    when: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)

    def contains(self, value: object) -> bool:
        """Say whether the setting may take a value; NaN and values of another type never.

        Example:
            >>> Parameter(name="hidden", kind="int", low=8, high=64).contains(8.5)
            False
        """
        if self.kind == "choice":
            return any(same_value(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.kind in {"int", "logint"} and value != int(value if math.isfinite(value) else 0):
            return False
        return self.low <= value <= self.high

    def middle(self) -> Scalar:
        """Return the value a pilot starts from: the first choice, or the (geometric) middle."""
        if self.kind == "choice":
            return self.choices[0]
        if self.kind in {"loguniform", "logint"}:
            middle = math.sqrt(self.low) * math.sqrt(self.high)
        else:
            middle = self.low + (self.high - self.low) / 2
        middle = min(max(middle, self.low), self.high)  # rounding must not leave the range
        if self.kind in {"int", "logint"}:
            whole: Scalar = normalised(self.name, round(middle))  # type: ignore[assignment]
            return whole
        return middle

    def smallest_number(self) -> float | None:
        """Return the smallest number it may take; None where it takes none."""
        if self.kind != "choice":
            return self.low
        numbers = [
            value
            for value in self.choices
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        return min(numbers, default=None)

    def largest_number(self) -> float | None:
        """Return the largest number it may take; None where it takes none."""
        if self.kind != "choice":
            return self.high
        numbers = [
            value
            for value in self.choices
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        return max(numbers, default=None)
