"""What records are made of: finite numbers, short strings and `None`, ready for JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

Scalar: TypeAlias = str | int | float | bool | None
Json: TypeAlias = "Scalar | list[Json] | dict[str, Json]"


def finite_or_none(value: float | None) -> float | None:
    """Return the number, or None where it is missing, NaN or infinite."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


class Record:
    """JSON round trip of a frozen dataclass."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return the record as a dict that `json.dumps(..., allow_nan=False)` accepts."""
        return dataclasses.asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the record again from what `to_json` returned.

        A later version may have written more; what is not known here is left out.

        Raises:
            TypeError: A key is missing.
        """
        return cls(**cls._known(data))

    @classmethod
    def _known(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return what of the data has a field here."""
        names = {spec.name for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
        return {name: value for name, value in data.items() if name in names}
