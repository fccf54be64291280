"""How a value outside its range is refused."""

import math


def require(rule: str, name: str, value: object, *, holds: bool) -> None:
    """Refuse a value that breaks its rule.

    Args:
        rule: What must hold, as the message says it.
        name: The setting.
        value: What was given.
        holds: True if it is as it must be.

    Raises:
        ValueError: It is not.
    """
    if not holds:
        raise ValueError(f"{name}: {rule} must hold, but got {value!r}.")


def is_positive(value: float | None) -> bool:
    """Return True for a finite number > 0, and for None, which is off."""
    return value is None or (math.isfinite(value) and value > 0)
