"""Trials by the values of one setting: a group per value, or bands where it varies freely."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeGuard

from stability_search.report.context import Row
from stability_search.report.wording import number, setting_value

MAX_VALUES = 5
"""Values of a setting that a figure tells apart; numbers of more values become bands."""

OFF = "off"
"""Label of null."""

_NUM_BANDS = 3
_OF_LOSS_SCALE = frozenset({"init_scale", "growth_interval", "max_scale"})
_MIN_SIDE = 3  # trials with and without a setting before its absence can be explained
_MIN_OF_PAIR = 10  # the same, where it takes two other settings to explain it
_MAX_CELLS = {1: MAX_VALUES, 2: 9}  # values of the settings that explain it

Group = tuple[str, list[Row]]


def groups_of(rows: Sequence[Row], name: str) -> list[Group]:
    """Return the trials by the value of a setting, in the order of the values.

    Args:
        rows: Trials.
        name: A setting.

    Returns:
        A label and its trials, none empty. A number of many values is cut into three bands that
        hold about as many trials each; of many other values those with the most trials stay.
    """
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get(name), []).append(row)
    numbers = [value for value in found if is_number(value)]
    if len(found) > MAX_VALUES and len(numbers) > MAX_VALUES:
        return _bands([row for row in rows if is_number(row.get(name))], name) + (
            [(OFF, found[None])] if None in found else []
        )
    kept = sorted(found, key=lambda value: -len(found[value]))[:MAX_VALUES]
    return [(label(value), found[value]) for value in sorted(kept, key=value_order)]


def applying(rows: Sequence[Row], name: str, names: Sequence[str]) -> list[Row]:
    """Return the trials to which a setting applies, where another one decides that.

    Args:
        rows: Trials.
        name: The setting.
        names: Every setting that varies.

    Returns:
        All trials, unless the setting is null exactly at certain values of another one, or of
        two others: then it is not off there, it has no meaning there. Settings of the loss scale
        mean something in fp16 only, whatever value a trial in another precision carries.
    """
    if name in _OF_LOSS_SCALE:
        rows = [row for row in rows if row.get("precision", "fp16") == "fp16"]
    is_null = [row.get(name) is None for row in rows]
    if min(sum(is_null), len(rows) - sum(is_null)) < _MIN_SIDE:
        return list(rows)
    others = [other for other in names if other != name]
    few = [other for other in others if len({row.get(other) for row in rows}) <= MAX_VALUES]
    pairs = combinations(few, 2) if min(sum(is_null), is_null.count(False)) >= _MIN_OF_PAIR else ()
    for deciding in (*((other,) for other in few), *pairs):
        cells = {
            (*(row.get(other) for other in deciding), null)
            for row, null in zip(rows, is_null, strict=True)
        }
        if len(cells) == len({cell[:-1] for cell in cells}) <= _MAX_CELLS[len(deciding)]:
            return [row for row in rows if row.get(name) is not None]
    return list(rows)


def label(value: Any) -> str:  # noqa: ANN401 - any JSON scalar
    """Return a value of a setting as a figure names it."""
    return OFF if value is None else setting_value(value)


def value_order(value: Any) -> tuple[int, float, str]:  # noqa: ANN401 - any JSON scalar
    """Return what values of a setting sort by: off first, then numbers, then text."""
    if value is None:
        return (0, 0.0, "")
    return (1, float(value), "") if isinstance(value, int | float) else (2, 0.0, str(value))


def is_number(value: Any) -> TypeGuard[int | float]:  # noqa: ANN401 - any JSON scalar
    """Return True for a number that is not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bands(rows: Sequence[Row], name: str) -> list[Group]:
    ordered = sorted(rows, key=lambda row: (row[name], row["trial_id"]))
    cuts = [ordered[len(ordered) * k // _NUM_BANDS][name] for k in range(1, _NUM_BANDS)]
    bands: list[list[Row]] = [[] for _ in range(_NUM_BANDS)]
    for row in ordered:
        bands[sum(row[name] >= cut for cut in cuts)].append(row)
    low, high = number(cuts[0]), number(cuts[-1])
    labels = (f"below {low}", f"{low} to {high}", f"{high} and above")
    return [(text, own) for text, own in zip(labels, bands, strict=True) if own]
