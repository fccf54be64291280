"""How the settings change the chance that a configuration is stable: a model with intervals.

A logistic regression with a weak prior over all settings at once, so that a setting is not
credited with what another one did: the search proposes values together. An effect is read by
giving *every* configuration the same value of one setting and averaging what the model says.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, expit, ndtri

from stability_search.report.context import Row
from stability_search.report.estimates import Share
from stability_search.report.grouping import MAX_VALUES, OFF, applying, groups_of, is_number

MIN_CONFIGURATIONS = 12
"""Configurations below which no effect is estimated."""

MIN_EACH = 3
"""Stable, and other, configurations below which no effect is estimated."""

WORTH_NAMING = 0.1
"""Difference of the chance of a stable end that a setting must exceed to be named."""

_PRIOR_SD = 2.5  # of a coefficient: a factor of 12 in the odds, per standard deviation or value
_NUM_DRAWS = 400
_MAX_AVERAGED = 400  # configurations an effect is averaged over
_MAX_ITERATIONS = 60
_LONGEST_STEP = 4.0  # of a coefficient in one iteration
_TOLERANCE = 1e-9
_LEAST_VARIANCE = 0.25  # of a cell: the model is never surer than of half a configuration
_KNOTS = (0.25, 0.5, 0.75)  # quantiles at which its effect may bend
_LEAST_WIDTH = 0.05  # of a bend, in standard deviations
_TAIL = 0.025  # each way, of a 95 % interval
_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of a setting that varies freely

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """The chance of a stable end where every configuration has one value of a setting.

    Attributes:
        text: The value.
        number: The value of a setting that varies freely; None for one of a few values.
        share: The chance, with its 95 % interval.
        num_configurations: Configurations with that value; all of a setting that varies freely.
    """

    text: str
    number: float | None
    share: Share
    num_configurations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What one setting does.

    Attributes:
        name: The setting.
        levels: Its values, in order.
        size: Difference of the chance between its best and its worst value, with its interval.
        is_clear: True if that exceeds `WORTH_NAMING` also when every setting that was looked at
            is taken into account (Bonferroni).
    """

    name: str
    levels: tuple[Level, ...]
    size: Share
    is_clear: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Configurations with one value of each of two settings.

    Attributes:
        first: Value of the first setting.
        second: Value of the second.
        num_stable: Stable configurations; one that was stable on some seeds counts in part.
        num_configurations: All there.
        expected: Stable ones that the two settings alone would lead to expect.
    """

    first: str
    second: str
    num_stable: float
    num_configurations: int
    expected: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two settings that do something together which neither does alone.

    Attributes:
        names: The two.
        cells: Their values together, none empty.
        second_order: Values of the second setting, in order.
        p_value: How often chance alone would do as much, all pairs considered.
    """

    names: tuple[str, str]
    cells: tuple[Cell, ...]
    second_order: tuple[str, ...]
    p_value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """Every effect of a study.

    Attributes:
        effects: By size, largest first.
        pairs: By how little chance alone explains them, strongest first.
        num_configurations: Configurations it is estimated from.
    """

    effects: tuple[Effect, ...]
    pairs: tuple[Pair, ...]
    num_configurations: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One configuration: its settings, and the share of its trials that was stable."""

    settings: Row
    stable: float


def configurations_of(rows: Sequence[Row]) -> list[Configuration]:
    """Gather trials by configuration, so that one of many seeds counts once."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["config_id"], []).append(row)
    return [
        Configuration(
            settings=own[0], stable=sum(bool(row["is_stable"]) for row in own) / len(own)
        )
        for _, own in sorted(found.items())
    ]


def has_enough(configurations: Sequence[Configuration]) -> bool:
    """Return True where both ends occur often enough to estimate anything."""
    stable = sum(one.stable for one in configurations)
    return (
        len(configurations) >= MIN_CONFIGURATIONS
        and min(stable, len(configurations) - stable) >= MIN_EACH
    )


def estimate(configurations: Sequence[Configuration], names: Sequence[str]) -> Effects:
    """Estimate what every setting does, and which pairs do more together.

    Args:
        configurations: What `configurations_of` returned; `has_enough` of them.
        names: Settings that vary.

    Returns:
        The same configurations give the same numbers.

    Source:
        Gelman et al., A weakly informative default prior distribution for logistic and other
        regression models, 2008 (scale 2.5); intervals from the normal approximation at the mode.
    """
    model = _Model(configurations, names)
    return Effects(
        effects=tuple(model.effects()),
        pairs=tuple(model.pairs()),
        num_configurations=len(configurations),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Factor:
    """One setting as columns of the model.

    Attributes:
        name: The setting.
        labels: Value or band of each configuration; None where the setting does not apply.
        order: The labels, in order.
        levels: What is asked of the model: text, number of a free value, code.
        columns: A row of code per configuration.
    """

    name: str
    labels: tuple[str | None, ...]
    order: tuple[str, ...]
    levels: tuple[tuple[str, float | None, Floats], ...]
    columns: Floats


def _factor(rows: Sequence[Row], name: str, names: Sequence[str]) -> _Factor | None:
    """Code a setting; None where fewer than two values of it were tried."""
    groups = groups_of(applying(rows, name, names), name)
    known = {id(row): text for text, own in groups for row in own}
    labels = tuple(known.get(id(row)) for row in rows)
    order = tuple(text for text, _ in groups)
    if len(order) < 2:  # noqa: PLR2004 - one value has no effect
        return None
    numbers = [row[name] for row in rows if is_number(row.get(name))]
    if len(set(numbers)) > MAX_VALUES:
        return _free(rows, name, labels, order, numbers)
    unit = np.eye(len(order))
    none = np.zeros(len(order))
    columns = np.array([none if text is None else unit[order.index(text)] for text in labels])
    levels = tuple((text, None, unit[i]) for i, text in enumerate(order))
    return _Factor(name=name, labels=labels, order=order, levels=levels, columns=columns)


def _free(
    rows: Sequence[Row],
    name: str,
    labels: tuple[str | None, ...],
    order: tuple[str, ...],
    numbers: Sequence[float],
) -> _Factor:
    """Code a setting that varies freely: a broken line over its logarithm; off is apart."""
    is_log = min(numbers) > 0
    scaled = np.log(numbers) if is_log else np.asarray(numbers, dtype=float)
    center, spread = float(scaled.mean()), float(scaled.std()) or 1.0
    z = (scaled - center) / spread
    knots = np.quantile(z, _KNOTS)
    bends = np.maximum(z[:, None] - knots, 0.0)
    widths = np.maximum(bends.std(axis=0), _LEAST_WIDTH)

    def code(value: Any) -> Floats:  # noqa: ANN401 - any JSON scalar
        if not is_number(value):
            return np.array([0.0, *(0.0 for _ in knots), 1.0 if value is None else 0.0])
        at = ((math.log(value) if is_log else float(value)) - center) / spread
        return np.array([at, *np.maximum(at - knots, 0.0) / widths, 0.0])

    asked = [float(q) for q in np.quantile(numbers, _QUANTILES, method="nearest")]
    levels: list[tuple[str, float | None, Floats]] = [
        (_short(value), value, code(value)) for value in dict.fromkeys(asked)
    ]
    if OFF in order:
        levels.insert(0, (OFF, None, code(None)))
    columns = np.array([code(row.get(name)) for row in rows])
    return _Factor(name=name, labels=labels, order=order, levels=tuple(levels), columns=columns)


def _short(value: float) -> str:
    """Return a number to two digits."""
    if value and abs(value) < 1e-3:  # noqa: PLR2004 - a row of zeros is hard to read
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.2g}"


class _Model:
    """The regression, fitted once and asked for every setting."""

    def __init__(self, configurations: Sequence[Configuration], names: Sequence[str]) -> None:
        rows = [one.settings for one in configurations]
        self._stable = np.array([one.stable for one in configurations])
        coded = [_factor(rows, name, names) for name in names]
        self._factors = [factor for factor in coded if factor is not None]
        blocks = [np.ones((len(rows), 1)), *(factor.columns for factor in self._factors)]
        ends = np.cumsum([block.shape[1] for block in blocks])
        self._places = [slice(start, end) for start, end in pairwise(ends)]
        self._design = np.hstack(blocks)
        self._mode, covariance = _fit(self._design, self._stable)
        root = np.linalg.cholesky(covariance)
        normal = np.random.default_rng(0).standard_normal((_NUM_DRAWS, len(self._mode)))
        self._draws = self._mode + normal @ root.T

    def effects(self) -> list[Effect]:
        """Return what every setting does, largest first."""
        found = [
            self._effect(factor, place)
            for factor, place in zip(self._factors, self._places, strict=True)
        ]
        return sorted(found, key=lambda effect: -effect.size.value)  # stable: ties keep order

    def _effect(self, factor: _Factor, place: slice) -> Effect:
        """Average the model over the configurations, with each value of one setting in turn."""
        own = np.flatnonzero([text is not None for text in factor.labels])
        own = own[np.linspace(0, len(own) - 1, min(_MAX_AVERAGED, len(own))).astype(int)]
        counts = Counter(factor.labels)
        levels, modes, drawn = [], [], []
        for text, value, code in factor.levels:
            design = self._design[own].copy()
            design[:, place] = code
            modes.append(float(expit(design @ self._mode).mean()))
            drawn.append(expit(design @ self._draws.T).mean(axis=0))
            levels.append(
                Level(
                    text=text,
                    number=value,
                    share=_share(modes[-1], drawn[-1]),
                    num_configurations=counts[text] if value is None else len(factor.labels),
                )
            )
        best, worst = int(np.argmax(modes)), int(np.argmin(modes))
        difference = drawn[best] - drawn[worst]
        size = _share(modes[best] - modes[worst], difference)
        surest = float(ndtri(1 - _TAIL / len(self._factors))) * float(difference.std())
        return Effect(
            name=factor.name,
            levels=tuple(levels),
            size=size,
            is_clear=size.value - surest > WORTH_NAMING and size.low > WORTH_NAMING,
        )

    def pairs(self) -> list[Pair]:
        """Test every pair for what its two settings alone do not explain, strongest first."""
        fitted = expit(self._design @ self._mode)
        found = [
            pair
            for first, second in combinations(self._factors, 2)
            if (pair := self._pair(first, second, fitted)) is not None
        ]
        found = [replace(pair, p_value=min(1.0, pair.p_value * len(found))) for pair in found]
        return sorted(found, key=lambda pair: pair.p_value)

    def _pair(self, first: _Factor, second: _Factor, fitted: Floats) -> Pair | None:
        """Compare what is stable in every cell with what the model expects there."""
        members: dict[tuple[int, int], list[int]] = {}
        for i, (one, other) in enumerate(zip(first.labels, second.labels, strict=True)):
            if one is not None and other is not None:
                key = (first.order.index(one), second.order.index(other))
                members.setdefault(key, []).append(i)
        sides = [len({key[side] for key in members}) for side in (0, 1)]
        freedom = (sides[0] - 1) * (sides[1] - 1)
        if freedom < 1:
            return None
        cells, excess = [], 0.0
        for key, own in sorted(members.items()):
            seen, expected = float(self._stable[own].sum()), float(fitted[own].sum())
            variance = float((fitted[own] * (1 - fitted[own])).sum())
            excess += (seen - expected) ** 2 / max(variance, _LEAST_VARIANCE)
            cells.append(
                Cell(
                    first=first.order[key[0]],
                    second=second.order[key[1]],
                    num_stable=seen,
                    num_configurations=len(own),
                    expected=expected,
                )
            )
        p_value = float(chdtrc(freedom, excess))
        return Pair(
            names=(first.name, second.name),
            cells=tuple(cells),
            second_order=second.order,
            p_value=p_value,
        )


def _fit(design: Floats, stable: Floats) -> tuple[Floats, Floats]:
    """Return the mode of the coefficients and their covariance there, by Newton's method."""
    prior = np.full(design.shape[1], 1 / _PRIOR_SD**2)
    prior[0] /= 16  # the intercept is nearly free
    mode = np.zeros(design.shape[1])
    for _ in range(_MAX_ITERATIONS):
        chance = expit(design @ mode)
        curvature = (design.T * (chance * (1 - chance))) @ design + np.diag(prior)
        slope = design.T @ (stable - chance) - prior * mode
        step = np.linalg.solve(curvature, slope)
        mode = mode + step * min(1.0, _LONGEST_STEP / max(float(np.abs(step).max()), 1e-12))
        if float(np.abs(step).max()) < _TOLERANCE:
            break
    return mode, np.asarray(np.linalg.inv(curvature), dtype=np.float64)


def _share(value: float, drawn: Floats) -> Share:
    low, high = np.quantile(drawn, [_TAIL, 1 - _TAIL])
    return Share(value=value, low=float(low), high=float(high))
