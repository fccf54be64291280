"""What a trial is asked to do: settings of the engine, of a trial and of a study.

A setting's name is the same here, in the space file, in the tables and in the report. Every
default is PyTorch's own, so that a setting nobody names changes nothing.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self

from stability_search.course import CourseRow
from stability_search.records import Json

OptimizerName = Literal["adamw", "adam", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]
Precision = Literal["fp32", "bf16", "fp16"]
SamplerName = Literal["tpe", "random", "qmc"]


def _require(rule: str, name: str, value: object, *, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name}: {rule} must hold, but got {value!r}.")


def _is_positive(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How one optimizer step is taken.

    Attributes:
        learning_rate: Peak learning rate, > 0. The setting that most often decides stability.
        num_planned_steps: Steps until `schedule` reaches 0, >= 1; unused by `constant`.
        optimizer: `adamw`, `adam` or `sgd`.
        weight_decay: >= 0; None takes PyTorch's default (0.01 for adamw, else 0).
        beta1: Adam's first-moment decay, in [0, 1).
        beta2: Adam's second-moment decay, in [0, 1). Lower forgets a gradient spike sooner.
        momentum: Of sgd, in [0, 1).
        eps: Added to Adam's denominator, > 0. Raise it where gradients are near it.
        warmup_steps: Steps over which the rate rises linearly from 0, >= 0.
        schedule: `constant`, or `linear` or `cosine` to 0 over the planned steps.
        precision: `fp32`, or `bf16` or `fp16` by autocast; fp16 scales the loss.
        fp16_on_cpu: `emulated` computes in fp32 and rounds to fp16 operator by operator;
            `native` uses the CPU's own fp16 kernels, 1 to 40 times slower than fp32, by model and
            processor.
        init_scale: First loss scale, >= 1; fp16 only. Below 1 it counts as collapsed.
        growth_interval: Steps without overflow until the scale doubles, >= 1; fp16 only.
        max_scale: Upper bound on the scale, > 0; None for none; fp16 only.
        clip_norm: Largest L2 norm of the gradient, > 0; None turns clipping off.
        attention_clamp: Attention outputs are clamped to [-c, c], c > 0; None is off.
        attention_logit_cap: Logits become c*tanh(logits/c) before the mask, c > 0; None is off.
        attention_precision: `trial`, or `fp32` to run attention outside autocast.
        attention_modules: Glob patterns; empty for every `nn.MultiheadAttention`.
        init_gain: Factor on the initial weight matrices, > 0; 1 changes nothing.
        norm: `keep`, or `group` to turn BatchNorm into GroupNorm.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        bad_microbatch: `skip` goes on without a non-finite micro-batch; `drop` gives up the
            window it belongs to.
        max_bad_steps: End the trial once so many steps were bad, >= 1; None for no limit.
    """

    learning_rate: float
    num_planned_steps: int = 1
    optimizer: OptimizerName = "adamw"
    weight_decay: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0
    eps: float = 1e-8
    warmup_steps: int = 0
    schedule: ScheduleName = "constant"
    precision: Precision = "fp32"
    fp16_on_cpu: Literal["emulated", "native"] = "emulated"
    init_scale: float = 65536.0
    growth_interval: int = 2000
    max_scale: float | None = None
    clip_norm: float | None = None
    attention_clamp: float | None = None
    attention_logit_cap: float | None = None
    attention_precision: Literal["trial", "fp32"] = "trial"
    attention_modules: tuple[str, ...] = ()
    init_gain: float = 1.0
    norm: Literal["keep", "group"] = "keep"
    gradient_checkpointing: bool = False
    bad_microbatch: Literal["skip", "drop"] = "skip"
    max_bad_steps: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            ValueError: Names the setting, the rule and the value received.
        """
        for name, choices in ENGINE_CHOICES.items():
            value = getattr(self, name)
            _require(f"one of {', '.join(choices)}", name, value, holds=value in choices)
        for name in (
            "learning_rate",
            "eps",
            "max_scale",
            "clip_norm",
            "attention_clamp",
            "attention_logit_cap",
            "init_gain",
        ):
            value = getattr(self, name)
            _require("a finite number > 0", name, value, holds=_is_positive(value))
        holds = math.isfinite(self.init_scale) and self.init_scale >= 1
        _require("a finite number >= 1", "init_scale", self.init_scale, holds=holds)
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            _require("0 <= value < 1", name, value, holds=0 <= value < 1)
        for name, low in (
            ("num_planned_steps", 1),
            ("growth_interval", 1),
            ("warmup_steps", 0),
            ("max_bad_steps", 1),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            _require(f"value >= {low}", name, value, holds=value is None or value >= low)

    @property
    def has_loss_scaling(self) -> bool:
        """True where the loss is scaled, that is in fp16."""
        return self.precision == "fp16"


ENGINE_CHOICES: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("constant", "linear", "cosine"),
    "precision": ("fp32", "bf16", "fp16"),
    "fp16_on_cpu": ("emulated", "native"),
    "attention_precision": ("trial", "fp32"),
    "norm": ("keep", "group"),
    "bad_microbatch": ("skip", "drop"),
}

ENGINE_SETTING_NAMES: tuple[str, ...] = tuple(
    spec.name for spec in dataclasses.fields(EngineSettings) if spec.name != "num_planned_steps"
)
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
            _require("0 < value < 1", name, value, holds=0 < value < 1)


class OnAlarm(StrEnum):
    """What a long run does when an alarm rises; a trial always only warns."""

    WARN = "warn"
    END_EPOCH = "end_epoch"
    END_RUN = "end_run"


ALARM_SHARES: frozenset[str] = frozenset(
    {"clip_frac", "overflow_rate", "clamp_frac", "cap_frac", "zero_grad_frac", "skipped_frac"}
)
"""Thresholds of `AlarmSettings` that are shares, at most 1; a share of 1 is never exceeded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AlarmSettings:
    """Beyond which value an indicator is worth a warning; every number is > 0.

    An alarm is named like its threshold. Norms do not carry over between models: after a calm
    run, set those of `grad_norm` to what was rare in it.

    Attributes:
        epoch_steps: Optimizer steps called an epoch; null takes a 50th of the run, at least 1.
            Set it to the steps of one pass over your data.
        on_alarm: What `bad_steps` and `skipped_frac` do in a long run: `warn`, `end_epoch` or
            `end_run`. A trial always only warns.
        attention_max: Absolute attention logit before cap and mask that is to be watched. Raise
            it for a model that is known to train calmly above it.
        attention_max_degraded: The same from which training is usually worse.
        attention_max_diverging: The same from which training usually diverges.
        clip_frac: Share of updates that were clipped; above a half, clipping is a hidden cut of
            the learning rate. 1 turns the alarm off where that is wanted.
        overflow_rate: Gradient overflows per step, of 200 steps after the loss scale was found;
            0.005 is one of them. Raise it with a short `growth_interval`, which probes more often.
        clamp_frac: Share of attention outputs beyond the clamp; above it the clamp masks growth
            and does not cure it.
        cap_frac: Share of attention logits beyond the cap; above it training depends on the cap.
        zero_grad_frac: Share of zero gradients above that of fp32, so 0.2 is 20 points; only
            judged where the share in fp32 is known. Raise it for sparse gradients.
        update_ratio: RMS of an update over RMS of its weights, in most steps; 1e-3 is typical.
            Raise it for weights that start near 0, such as adapters.
        grad_rms_over_eps: Smallest RMS of a weight matrix's gradient over Adam's `eps`, in most
            steps; the alarm rises *below* it, where `eps` shrinks the update.
        grad_norm: Gradient norm before clipping that is worth a warning at any time.
        grad_norm_late: The same after epoch `late_epoch`, when norms should have fallen.
        late_epoch: Epochs that `grad_norm_late` leaves out at the start.
        grad_norm_jump: Gradient norm as a multiple of that of the step before. Raise it for
            batches of very different length.
        grad_norm_advise: Gradient norm at which a tenth of the learning rate is advised.
        bad_steps_advise: `bad` steps (NaN or Inf) in an epoch beyond which the same is advised.
        stale_epochs: Epochs, of at least 20 steps together, without a new lowest mean loss after
            which the same is advised. Raise it where an epoch is short or its loss noisy.
        bad_steps: `bad` steps in an epoch beyond which `on_alarm` acts.
        skipped_frac: Share of an epoch's steps that changed no parameter, two at least and the
            search for a loss scale left out, beyond which `on_alarm` acts.
    """

    epoch_steps: int | None = None
    on_alarm: OnAlarm = OnAlarm.WARN
    attention_max: float = 100.0
    attention_max_degraded: float = 1e3
    attention_max_diverging: float = 1e4
    clip_frac: float = 0.5
    overflow_rate: float = 0.005
    clamp_frac: float = 0.01
    cap_frac: float = 0.01
    zero_grad_frac: float = 0.2
    update_ratio: float = 0.01
    grad_rms_over_eps: float = 10.0
    grad_norm: float = 50.0
    grad_norm_late: float = 20.0
    late_epoch: int = 5
    grad_norm_jump: float = 10.0
    grad_norm_advise: float = 100.0
    bad_steps_advise: int = 1
    stale_epochs: int = 3
    bad_steps: int = 10
    skipped_frac: float = 0.5

    def __post_init__(self) -> None:
        """Refuse thresholds outside their range; NaN is outside of every range.

        Raises:
            ValueError: Names the threshold, the rule and the value received.
        """
        words = tuple(str(member) for member in OnAlarm)
        _require(
            f"one of {', '.join(words)}", "on_alarm", self.on_alarm, holds=self.on_alarm in words
        )
        for spec in dataclasses.fields(self):
            name, value = spec.name, getattr(self, spec.name)
            if name == "on_alarm" or (value is None and spec.default is None):
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name in ALARM_SHARES:
                _require("0 < value <= 1", name, value, holds=is_number and 0 < value <= 1)
            elif name == "epoch_steps" or isinstance(spec.default, int):
                holds = is_number and isinstance(value, int) and value >= 1
                _require("an integer >= 1", name, value, holds=holds)
            else:
                holds = is_number and _is_positive(value)
                _require("a finite number > 0", name, value, holds=holds)


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
            _require("value >= 1", name, value, holds=value >= 1)
        _require("a finite number > 0", "timeout_s", self.timeout_s, holds=self.timeout_s > 0)
        _require(
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What one trial occupies.

    Attributes:
        cpu: CPU cores of a trial, > 0.
        gpu: GPUs of a trial, whole or a share of one; None takes one where there is one, or none.
        accelerator: GPU model that trials must run on, as Ray names it; None for any.
        custom: Other resources of a node that a trial occupies, by the name they were given when
            the node was started; > 0 each.
        labels: What a node must be labelled with to run trials: for each label the values it may
            have, at least one.
    """

    cpu: float = 1.0
    gpu: float | None = None
    accelerator: str | None = None
    custom: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """The search stage and the budgets of the whole study.

    Attributes:
        trials: Trials of the search stage, killed ones included, >= 1.
        sampler: Who proposes: `tpe` learns from results, `random` and `qmc` do not.
        max_concurrent: Trials at once, >= 1; None fills the machine.
        time_budget_s: Seconds for all stages together; None for no limit.
        step_budget: Optimizer steps for all stages together; None for no limit.
        resources: What one trial occupies.
    """

    trials: int = 48
    sampler: SamplerName = "tpe"
    max_concurrent: int | None = None
    time_budget_s: float | None = None
    step_budget: int | None = None
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmSettings:
    """The confirmation stage.

    Attributes:
        top: Candidates taken from the search, >= 1.
        seeds: Fresh seeds of each configuration, >= 1; fewer than 5 never name a winner.
        steps: Optimizer steps of a confirm trial, >= `trial.steps`.
        octaves: Doublings of the learning rate tried above a configuration, >= 0.
        min_margin: Doublings it must survive to be called stable, <= `octaves`.
    """

    top: int = 3
    seeds: int = 5
    steps: int = 400
    octaves: int = 3
    min_margin: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class StudySettings:
    """Every block of a space file but the task, the settings and their ranges.

    Attributes:
        name: Name of the study, a plain file name.
        seed: Seed every other seed is made from, >= 0.
        trial_steps: Horizon of pilot and search trials, >= 20.
        timeout_s: Wall-clock limit of a trial of `trial_steps`; others in proportion.
        search: The search stage and the budgets.
        kill_rule: When bad steps end a trial.
        control: Share of killed search trials that are let run on, in [0, 1].
        confirm: The confirmation stage.
        targets: Upper limits of task metrics, or of `grad_norm`, shown in the report.
        course: What a long training should have reached by which epoch, epochs rising.
        alarms: When an indicator is worth a warning.
    """

    name: str
    seed: int = 0
    trial_steps: int = 200
    timeout_s: float = 300.0
    search: SearchSettings = field(default_factory=SearchSettings)
    kill_rule: KillRule = field(default_factory=KillRule)
    control: float = 0.0
    confirm: ConfirmSettings = field(default_factory=ConfirmSettings)
    targets: Mapping[str, float] = field(default_factory=dict)
    course: tuple[CourseRow, ...] = ()
    alarms: AlarmSettings = field(default_factory=AlarmSettings)
