"""`Space`: a space file that was found right, as an immutable value."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stability_search.records.values import Json, Scalar
from stability_search.settings.engine import ENGINE_SETTING_NAMES, EngineSettings
from stability_search.settings.study import StudySettings
from stability_search.settings.trial import TRIAL_SETTING_NAMES, TaskReference, TrialConfig
from stability_search.settings.trial import config_id as hash_settings
from stability_search.space.parameter import Parameter, same_value
from stability_search.space.setting_values import MODULES_SETTING, normalised

NUM_PILOT_RATES = 7
_PILOT_SPAN = 4.0  # a fixed learning rate is swept from a quarter to four times
_STABILISERS = ("clip_norm", "attention_clamp", "attention_logit_cap")


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """What is trained, which settings vary and how hard to look.

    Attributes:
        path: The file as it was found.
        folder: Folder that relative paths of the task's arguments start from, absolute.
        text: YAML text with `--set` applied and comments kept; loading it gives this space.
        study: Every block but the task, the settings and their ranges.
        task: Where the task's class is.
        task_name: The task as written.
        task_args: Arguments of the task's constructor, settings left out.
        fixed: Settings that do not vary.
        parameters: Settings that vary, each after those its `when` names.
        start_with: Configurations tried first; a value left out is sampled.
        defaults: Value of settings that the file does not name, where it is known.
        unchecked: Names of settings and arguments that only the task itself can judge.
    """

    path: Path
    folder: Path
    text: str
    study: StudySettings
    task: TaskReference
    task_name: str
    task_args: Mapping[str, Json] = field(default_factory=dict)
    fixed: Mapping[str, Json] = field(default_factory=dict)
    parameters: tuple[Parameter, ...] = ()
    start_with: tuple[Mapping[str, Scalar], ...] = ()
    defaults: Mapping[str, Json] = field(default_factory=dict)
    unchecked: tuple[str, ...] = ()

    @property
    def has_space(self) -> bool:
        """True where something varies; else the file is one configuration."""
        return bool(self.parameters)

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the settings that vary, in the order of `parameters`."""
        return tuple(parameter.name for parameter in self.parameters)

    def is_active(self, parameter: Parameter, values: Mapping[str, Any]) -> bool:
        """Say whether a setting applies.

        Args:
            parameter: One of `parameters`.
            values: Values of the settings that vary; a fixed one need not be named.
        """
        for name, allowed in parameter.when.items():
            value = values.get(name, self.fixed.get(name, self.defaults.get(name)))
            if not any(same_value(value, one) for one in allowed):
                return False
        return True

    def settings(self, values: Mapping[str, Any]) -> dict[str, Json]:
        """Return every named setting of one configuration.

        Args:
            values: A value for each setting that varies and applies; others are ignored.

        Returns:
            Fixed and varying settings, None where one is inactive.

        Raises:
            ValueError: A setting that applies has no value.
        """
        return self._resolved(self.fixed, values, is_complete=True)

    def _resolved(
        self, base: Mapping[str, Json], values: Mapping[str, Any], *, is_complete: bool
    ) -> dict[str, Json]:
        resolved: dict[str, Json] = dict(base)
        for parameter in self.parameters:
            name = parameter.name
            if not self.is_active(parameter, resolved):
                resolved[name] = None
            elif name in values:
                resolved[name] = normalised(name, values[name])
            elif is_complete:
                raise ValueError(f"{name}: a value is required, but got none.")
            else:
                resolved[name] = None
        return resolved

    def _active(self, settings: Mapping[str, Json]) -> dict[str, Json]:
        inactive = {
            parameter.name
            for parameter in self.parameters
            if not self.is_active(parameter, settings)
        }
        return {name: value for name, value in settings.items() if name not in inactive}

    def config_id(self, settings: Mapping[str, Json]) -> str:
        """Hash the active settings of a configuration.

        Args:
            settings: What `settings` or `at_learning_rate` returned.
        """
        return hash_settings(self._active(settings))

    def at_learning_rate(self, settings: Mapping[str, Json], rate: float) -> dict[str, Json]:
        """Return the same configuration at another learning rate, in or out of its range.

        Args:
            settings: What `settings` returned.
            rate: The rate, > 0.
        """
        base = {name: settings[name] for name in self.fixed}
        values = {name: settings[name] for name in self.varying}
        rated = {"learning_rate": float(rate)}
        return self._resolved({**base, **rated}, {**values, **rated}, is_complete=False)

    def trial_config(
        self,
        settings: Mapping[str, Json],
        *,
        seed: int,
        steps: int,
        device: Literal["cpu", "cuda"],
    ) -> TrialConfig:
        """Return everything that decides a trial.

        Args:
            settings: What `settings` or `at_learning_rate` returned.
            seed: Seed of the trial, >= 0.
            steps: Its horizon, >= 1; the wall-clock limit grows in proportion.
            device: Where it runs.
        """
        active = self._active(settings)
        engine: dict[str, Any] = {
            name: tuple(value) if name == MODULES_SETTING and isinstance(value, list) else value
            for name, value in active.items()
            if name in ENGINE_SETTING_NAMES
        }
        trial: dict[str, Any] = {
            name: value for name, value in active.items() if name in TRIAL_SETTING_NAMES
        }
        task_settings = {
            name: value for name, value in active.items() if name not in {*engine, *trial}
        }
        return TrialConfig(
            task=self.task,
            task_args={**self.task_args, **task_settings},
            engine=EngineSettings(**engine, num_planned_steps=steps),
            num_planned_steps=steps,
            timeout_s=self.study.timeout_s * steps / self.study.trial_steps,
            seed=seed,
            kill_rule=self.study.kill_rule,
            alarms=self.study.alarms,
            device=device,
            **trial,
        )

    def _parameter(self, name: str) -> Parameter | None:
        return next((one for one in self.parameters if one.name == name), None)

    def learning_rate_range(self) -> tuple[float, float]:
        """Return the lowest and the highest learning rate; equal where it is fixed."""
        parameter = self._parameter("learning_rate")
        if parameter is None:
            rate = float(self.fixed["learning_rate"])  # type: ignore[arg-type]
            return rate, rate
        low, high = parameter.smallest_number(), parameter.largest_number()
        if low is None or high is None:
            raise AssertionError("a learning rate is a number")
        return low, high

    def pilot_learning_rates(self) -> tuple[float, ...]:
        """Return the rates of the pilot's sweep, even in log, rising."""
        low, high = self.learning_rate_range()
        if low == high:
            low, high = low / _PILOT_SPAN, high * _PILOT_SPAN
        ratio = high / low
        inner = (low * ratio ** (k / (NUM_PILOT_RATES - 1)) for k in range(1, NUM_PILOT_RATES - 1))
        return (low, *inner, high)

    def pilot_settings(self, *, with_stabilisers: bool = False) -> dict[str, Json]:
        """Return the configuration of the pilot, whose learning rate is then swept.

        Args:
            with_stabilisers: Put each varying clip, clamp and cap at its smallest number, for
                the second attempt after no run of the first was finite.

        Returns:
            Settings in fp32. Any other setting has its fixed value, or its value in the first
            of `start_with`, or its default where that lies in the space, or its middle.
        """
        values = self._first_values()
        if with_stabilisers:
            for parameter in self.parameters:
                smallest = parameter.smallest_number()
                if parameter.name in _STABILISERS and smallest is not None:
                    values[parameter.name] = smallest
        fp32: dict[str, Json] = {"precision": "fp32"}
        base = {**self.fixed, **fp32} if "precision" in self.fixed else self.fixed
        return self._resolved(base, {**values, **fp32}, is_complete=True)

    def today_settings(self) -> dict[str, Json]:
        """Return the configuration that counts as today's.

        Returns:
            The file's one configuration; or, where settings vary, the first of `start_with`. What
            that leaves out has its default where that lies in the space, or its middle.
        """
        return self.settings(self._first_values())

    def _first_values(self) -> dict[str, Json]:
        first = self.start_with[0] if self.start_with else {}
        values: dict[str, Json] = {}
        for parameter in self.parameters:
            name = parameter.name
            default = self.defaults.get(name)
            is_default_in = name in self.defaults and parameter.contains(default)
            values[name] = first.get(name, default if is_default_in else parameter.middle())
        return values


def describe(space: Space) -> str:
    """Say in one line what a valid space file asks for."""
    num_conditional = sum(1 for parameter in space.parameters if parameter.when)
    conditional = f" ({num_conditional} conditional)" if num_conditional else ""
    confirm = space.study.confirm
    num_varying = len(space.parameters)
    if space.has_space:
        what = f"{_count(num_varying, 'setting')} {'varies' if num_varying == 1 else 'vary'}"
        trials = _count(space.study.search.trials, "trial")
        stages = f"{trials} of {space.study.trial_steps} steps"
        num_ladders = confirm.top + (1 if space.start_with else 0)
        ladders = f"up to {_count(num_ladders, 'ladder')}"
    else:
        what, stages, ladders = "1 configuration", "no search", "1 ladder"
    text = (
        f"{space.path}: ok. {what}{conditional}, {len(space.fixed)} fixed; {stages}, then "
        f"{ladders} of {confirm.steps} steps on {_count(confirm.seeds, 'seed')}"
    )
    if space.unchecked:
        text += f"; not checked: {', '.join(space.unchecked)}"
    return text


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
