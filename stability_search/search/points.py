"""From a point of the unit cube to values of the settings that vary."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stability_search.records.values import Scalar
from stability_search.space import Parameter, Space
from stability_search.space.parameter import same_value


def sobol_point(num_dimensions: int, index: int, seed: int) -> list[float]:
    """Return one point of a scrambled Sobol sequence, which fills the cube evenly.

    Args:
        num_dimensions: Coordinates of the point, >= 1.
        index: Position in the sequence, from 0.
        seed: Which scrambling.

    Returns:
        Coordinates in [0, 1).
    """
    from scipy.stats import qmc

    sequence = qmc.Sobol(num_dimensions, scramble=True, rng=seed)
    if index:
        sequence.fast_forward(index)
    return [float(coordinate) for coordinate in sequence.random(1)[0]]


def random_point(num_dimensions: int, seed: int) -> list[float]:
    """Return a point drawn evenly from the unit cube."""
    import numpy as np

    return [float(coordinate) for coordinate in np.random.default_rng(seed).random(num_dimensions)]


def active_values(space: Space, choose: Callable[[Parameter], Scalar]) -> dict[str, Any]:
    """Choose a value for every setting that varies and applies.

    Args:
        space: What varies.
        choose: Called for each such setting, those that others depend on first.
    """
    values: dict[str, Any] = {}
    resolved: dict[str, Any] = {}  # an inactive setting is null to those that depend on it
    for parameter in space.parameters:
        resolved[parameter.name] = None
        if space.is_active(parameter, resolved):
            resolved[parameter.name] = values[parameter.name] = choose(parameter)
    return values


def values_at(space: Space, point: Sequence[float], given: Mapping[str, Any]) -> dict[str, Any]:
    """Map a point of the unit cube to values; every setting has its own coordinate.

    So a conditional space needs nothing special: an inactive setting's coordinate is unused.

    Args:
        space: What varies.
        point: A coordinate in [0, 1) for each of its parameters.
        given: Values to take instead, where they apply.
    """
    coordinates = dict(zip(space.varying, point, strict=True))

    def choose(parameter: Parameter) -> Scalar:
        if parameter.name in given:
            return _as_in_space(parameter, given[parameter.name])
        return _value_at(parameter, coordinates[parameter.name])

    return active_values(space, choose)


def choice_index(parameter: Parameter, value: Scalar) -> int:
    """Return the position of a value among a parameter's choices.

    Raises:
        ValueError: The value is none of them.
    """
    for index, choice in enumerate(parameter.choices):
        if same_value(choice, value):
            return index
    raise ValueError(f"{parameter.name}: one of {parameter.choices} is required, got {value!r}.")


def _as_in_space(parameter: Parameter, value: Any) -> Scalar:  # noqa: ANN401 - any YAML value
    """Write a given value as the space does, so that `1` and `1.0` are one configuration."""
    if parameter.kind == "choice":
        return parameter.choices[choice_index(parameter, value)]
    return int(value) if parameter.kind in {"int", "logint"} else float(value)


def _value_at(parameter: Parameter, coordinate: float) -> Scalar:
    low, high = parameter.low, parameter.high
    match parameter.kind:
        case "choice":
            return parameter.choices[int(coordinate * len(parameter.choices))]
        case "uniform":
            return min(low + coordinate * (high - low), high)
        case "loguniform":
            return min(max(low * math.exp(coordinate * math.log(high / low)), low), high)
        case "int":
            return min(math.floor(low + coordinate * (high - low + 1)), int(high))
        case "logint":  # each whole number owns the interval half a unit around it
            span = math.log((high + 0.5) / (low - 0.5))
            number = round((low - 0.5) * math.exp(coordinate * span))
            return min(max(number, int(low)), int(high))
