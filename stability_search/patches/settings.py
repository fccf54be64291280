"""Every value of the patches: from Python, the environment, or arguments of `instrument`."""

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from stability_search.errors import UsageError
from stability_search.settings.alarms import AlarmSettings

PREFIX = "STABILITY_SEARCH_"
ALARM_PREFIX = PREFIX + "ALARM_"
INIT_SCALE = 1024.0
GROWTH_INTERVAL = 100
# A growth interval of 100 may cost one step in 100: that alone is no alarm.
OVERFLOW_RATE = 0.02

_LARGEST = 3.4e38  # float32, in which PyTorch keeps the scale
_OFF = ("null", "none", "")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _alarms() -> AlarmSettings:
    return AlarmSettings(overflow_rate=OVERFLOW_RATE)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchSettings:
    """How the patches act.

    Attributes:
        init_scale: First loss scale of a `GradScaler`, > 0. None takes 1024 and keeps a value the
            script gives itself; a number replaces that too.
        growth_interval: Good steps after which the loss scale doubles, >= 1. None takes 100 and
            keeps the script's own; a number replaces that too. Raise it if overflows return as
            often as the scale grows.
        min_scale: The loss scale never falls below it, > 0. Below 1 loss scaling has failed.
        max_scale: The loss scale never grows beyond it; None is PyTorch's own: no limit.
        every_steps: Steps between two lines of progress, >= 1.
        observe: True says everything and changes nothing.
        anomaly: True turns on `torch.autograd.set_detect_anomaly`, which names the operation that
            gave NaN, at a third of the speed or so.
        alarms: Thresholds of the alarms; its `on_alarm` may end the epoch or the run.
    """

    init_scale: float | None = None
    growth_interval: int | None = None
    min_scale: float = 1.0
    max_scale: float | None = None
    every_steps: int = 500
    observe: bool = False
    anomaly: bool = False
    alarms: AlarmSettings = field(default_factory=_alarms)

    def __post_init__(self) -> None:
        """Refuse values that cannot be honoured.

        Raises:
            ValueError: Names every value that is outside its range.
        """
        problems = _problems(dataclasses.asdict(self))
        if problems:
            raise ValueError(" ".join(problems))

    @property
    def first_scale(self) -> float:
        """The loss scale that a `GradScaler` without one of its own starts with."""
        return INIT_SCALE if self.init_scale is None else self.init_scale

    @property
    def interval(self) -> int:
        """The growth interval of a `GradScaler` without one of its own."""
        return GROWTH_INTERVAL if self.growth_interval is None else self.growth_interval

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Self:
        """Read the settings from variables named `STABILITY_SEARCH_INIT_SCALE` and so on.

        Args:
            environment: The variables; None takes the process's own. Names of other parts of the
                program are left alone, a misspelt one is not.

        Raises:
            UsageError: Every variable that cannot be honoured, with what it must hold.

        Example:
            >>> PatchSettings.from_environment({"STABILITY_SEARCH_MAX_SCALE": "2048"}).max_scale
            2048.0
        """
        variables = os.environ if environment is None else environment
        problems: list[str] = []
        values = _read(variables, PREFIX, _READERS, problems)
        alarms = _read(variables, ALARM_PREFIX, _ALARM_READERS, problems)
        problems += _misspelt(variables)
        if not problems:
            problems += [
                f"{variable(name)}{rest}"
                for name, rest in (_cut(problem) for problem in _problems(_filled(values)))
            ]
        try:
            values["alarms"] = dataclasses.replace(_alarms(), **alarms)
        except ValueError as error:
            name, rest = _cut(str(error))
            problems.append(f"{variable('alarms.' + name)}{rest}")
        if problems:
            raise UsageError("\n".join(problems), hint="Nothing was started.")
        return cls(**values)


def variable(name: str) -> str:
    """Return the variable that holds a setting.

    Example:
        >>> variable("init_scale"), variable("alarms.grad_norm")
        ('STABILITY_SEARCH_INIT_SCALE', 'STABILITY_SEARCH_ALARM_GRAD_NORM')
    """
    return PREFIX + name.replace("alarms.", "alarm_").upper()


def _problems(values: Mapping[str, Any]) -> list[str]:
    """Say which values are outside their range, which NaN is always."""
    found = []
    for name in ("init_scale", "min_scale", "max_scale"):
        value = values[name]
        if value is not None and not 0 < value <= _LARGEST:
            found.append(_outside(name, "0 < value <= 3.4e38", value))
    for name in ("growth_interval", "every_steps"):
        value = values[name]
        if value is not None and not (isinstance(value, int) and value >= 1):
            found.append(_outside(name, "an integer >= 1", value))
    if found:
        return found
    low, high = values["min_scale"], values["max_scale"]
    first = values["init_scale"]
    if high is not None and not low <= high:
        found.append(_outside("max_scale", f"value >= min_scale ({low:g})", high))
    elif first is not None and not low <= first <= (math.inf if high is None else high):
        limits = f"min_scale ({low:g}) <= value" + ("" if high is None else f" <= {high:g}")
        found.append(_outside("init_scale", limits, first))
    return found


def _outside(name: str, rule: str, value: object) -> str:
    shown = f"{value:g}" if isinstance(value, float) else repr(value)
    return f"{name}: {rule} must hold, but got {shown}."


def _cut(problem: str) -> tuple[str, str]:
    """Split the name of a setting from what is wrong with it."""
    name, colon, rest = problem.partition(":")
    return name, colon + rest


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        spec.name: spec.default
        for spec in dataclasses.fields(PatchSettings)
        if spec.name != "alarms"
    }
    return {**defaults, **values}


def _read(
    variables: Mapping[str, str],
    prefix: str,
    readers: Mapping[str, Callable[[str], Any]],
    problems: list[str],
) -> dict[str, Any]:
    values = {}
    for name, reader in readers.items():
        text = variables.get(prefix + name.upper())
        if text is None:
            continue
        try:
            values[name] = reader(text.strip())
        except ValueError as error:
            problems.append(f"{prefix}{name.upper()}: {error}, but got {text!r}.")
    return values


def _misspelt(variables: Mapping[str, str]) -> list[str]:
    known = [PREFIX + name.upper() for name in _READERS]
    known += [ALARM_PREFIX + name.upper() for name in _ALARM_READERS]
    found = []
    for name in variables:
        if not name.startswith(PREFIX) or name in known:
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            found.append(f"{name}: no such setting. Did you mean {close[0]}?")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be an integer") from None


def _number_or_off(text: str) -> float | None:
    return None if text.lower() in _OFF else _number(text)


def _integer_or_off(text: str) -> int | None:
    return None if text.lower() in _OFF else _integer(text)


def _flag(text: str) -> bool:
    if text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    raise ValueError("must be 1 or 0")


_READERS: Mapping[str, Callable[[str], Any]] = {
    "init_scale": _number_or_off,
    "growth_interval": _integer_or_off,
    "min_scale": _number,
    "max_scale": _number_or_off,
    "every_steps": _integer,
    "observe": _flag,
    "anomaly": _flag,
}


def _alarm_reader(default: object) -> Callable[[str], Any]:
    if isinstance(default, str):  # `on_alarm`, a word
        return str
    if isinstance(default, int):
        return _integer
    return _integer_or_off if default is None else _number


# The others need what only the engine measures.
_MEASURED = (
    *("epoch_steps", "on_alarm", "clip_frac", "overflow_rate", "grad_norm", "grad_norm_late"),
    *("late_epoch", "grad_norm_jump", "grad_norm_advise", "bad_steps_advise", "stale_epochs"),
    *("bad_steps", "skipped_frac"),
)
_ALARM_READERS: Mapping[str, Callable[[str], Any]] = {
    spec.name: _alarm_reader(spec.default)
    for spec in dataclasses.fields(AlarmSettings)
    if spec.name in _MEASURED
}
ALARM_SETTING_NAMES: tuple[str, ...] = tuple(_ALARM_READERS)
"""Every threshold that `STABILITY_SEARCH_ALARM_...` and `--alarm` can set."""
