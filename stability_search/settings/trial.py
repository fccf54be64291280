"""One configuration with one seed: everything that decides a trial."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from stability_search.records.values import Json
from stability_search.settings.alarms import AlarmSettings, OnAlarm
from stability_search.settings.engine import ENGINE_SETTING_NAMES, EngineSettings
from stability_search.settings.rules import require

TRIAL_SETTING_NAMES: tuple[str, ...] = ("batch_size", "accumulation_steps")
SETTING_NAMES: tuple[str, ...] = (*ENGINE_SETTING_NAMES, *TRIAL_SETTING_NAMES)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskReference:
    """Where a task's class is: in an importable module, or in a file.

    Attributes:
        module: Dotted module name; empty where the class is in a file.
        file: Absolute path of the file; empty where the class is in a module.
        class_name: The class in it.
        folder: Absolute folder that relative paths are relative to while the task is built; empty
            for the folder of the file, or the current one where there is no file.
    """

    module: str = ""
    file: str = ""
    class_name: str
    folder: str = ""

    def __post_init__(self) -> None:
        """Refuse a reference to both or neither.

        Raises:
            ValueError: Not exactly one of `module` and `file` is given.
        """
        if bool(self.module) == bool(self.file):
            raise ValueError(
                "task: exactly one of module and file must be given, but got "
                f"module={self.module!r}, file={self.file!r}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class KillRule:
    """When a trial is stopped for its rate of bad steps; see `pruning.KillTest`.

    Attributes:
        bad_rate: r0, the rate of bad steps still accepted, in (0, 1).
        false_kill: delta, the chance of killing a trial whose rate is r0 or less, in (0, 1).
    """

    bad_rate: float = 0.05
    false_kill: float = 0.01

    def __post_init__(self) -> None:
        """Refuse rates outside (0, 1).

        Raises:
            ValueError: Names the rate and the value received.
        """
        for name in ("bad_rate", "false_kill"):
            value = getattr(self, name)
            require("0 < value < 1", name, value, holds=0 < value < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConstants:
    """What the study fixes for a trial of one horizon.

    Attributes:
        e0: E_0, the probe loss that counts as no progress; None in the pilot or if unknown.
        delta: E_0 - E*, the yardstick of progress, > 0; None turns the loss stop off.
        probe_steps: Attempted steps after which the probe is read, rising, 0 first.
        measures_blind_run: True for the one pilot trial that also measures `baseline()` or the
            blind run.
        control: Share of trials let run on if killed, in [0, 1]; 0 but in the search.
    """

    e0: float | None = None
    delta: float | None = None
    probe_steps: tuple[int, ...]
    measures_blind_run: bool = False
    control: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """One configuration with one seed: everything that decides a trial.

    Attributes:
        task: Where the task is.
        task_args: Arguments of the task's constructor, task settings included.
        engine: Settings of the engine; its `num_planned_steps` equals the field here.
        batch_size: Samples of one micro-batch, >= 1.
        accumulation_steps: Micro-batches of one optimizer step, >= 1.
        num_planned_steps: The horizon T, >= 1.
        timeout_s: Hard wall-clock limit, > 0.
        seed: Seed of the trial, >= 0.
        kill_rule: When bad steps end the trial.
        alarms: When an indicator is worth a warning; never ends the trial.
        device: `cpu` or `cuda`.
    """

    task: TaskReference
    task_args: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineSettings
    batch_size: int = 16
    accumulation_steps: int = 1
    num_planned_steps: int
    timeout_s: float = 300.0
    seed: int = 0
    kill_rule: KillRule = field(default_factory=KillRule)
    alarms: AlarmSettings = field(default_factory=AlarmSettings)
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            ValueError: Names the field, the rule and the value received.
        """
        for name in ("batch_size", "accumulation_steps", "num_planned_steps"):
            value = getattr(self, name)
            require("value >= 1", name, value, holds=value >= 1)
        require("a finite number > 0", "timeout_s", self.timeout_s, holds=self.timeout_s > 0)
        require(
            "equal to num_planned_steps",
            "engine.num_planned_steps",
            self.engine.num_planned_steps,
            holds=self.engine.num_planned_steps == self.num_planned_steps,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as a dict that `json.dumps` accepts."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Build the configuration again from what `to_json` returned."""
        engine = dict(data["engine"])
        engine["attention_modules"] = tuple(engine["attention_modules"])
        alarms = dict(data["alarms"])
        alarms["on_alarm"] = OnAlarm(alarms["on_alarm"])
        return cls(
            **{
                **data,
                "task": TaskReference(**data["task"]),
                "engine": EngineSettings(**engine),
                "kill_rule": KillRule(**data["kill_rule"]),
                "alarms": AlarmSettings(**alarms),
            }
        )


def config_id(settings: Mapping[str, Json]) -> str:
    """Hash the content of a configuration.

    Args:
        settings: Its active settings, the learning rate included. An inactive setting is left
            out; one that is off is None.

    Returns:
        Ten hexadecimal digits; equal for equal content, whatever the order of the keys.

    Example:
        >>> config_id({"a": 1, "b": None}) == config_id({"b": None, "a": 1})
        True
    """
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
