"""Plays of confirm: bases told apart by their clip norm, rungs that are fixed."""

from collections.abc import Callable, Mapping
from typing import Any

from stability_search.records.trial import Outcome
from stability_search.space import Space
from tests.search.confirm_world import (
    Truth,
    config,
    make_space,
    searched,
)

RATE = 2.0**-6
CLIPS = (None, 1.0, 2.0, 3.0)


def by_clip(truth: Callable[[float | None, int], float | Outcome]) -> Truth:
    """Let the truth depend on clip norm and seed; rates above RATE/2 are a little worse."""

    def of_settings(values: Mapping[str, Any], seed: int, _attempt: int) -> float | Outcome:
        q = truth(values["clip_norm"], seed)
        is_worse = isinstance(q, float) and values["learning_rate"] > RATE / 2
        return q - 0.02 if is_worse else q  # type: ignore[operator]

    return of_settings


def fixed_rungs(**confirm: Any) -> Space:  # noqa: ANN401 - fields of ConfirmSettings
    """Return a space in which the base of a candidate at RATE is the rung below it."""
    return make_space(low=RATE / 2, **{"top": 4, **confirm})


def two(space: Space) -> list[Any]:
    """Return a search that found two clip norms at RATE."""
    return searched(space, (0.9, config(RATE, 1.0)), (0.8, config(RATE, 2.0)))


def name(space: Space, clip: float | None, rate: float = RATE / 2) -> str:
    """Return the config_id of a clip norm at the rate of its base."""
    return space.config_id(space.settings(config(rate, clip)))


def one_look(spent: int, more: int) -> bool:
    """Afford both ladders, 26 trials, and no second look."""
    return spent + more <= 30
