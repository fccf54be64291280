"""The rungs of the ladder: one configuration with one thing left out or changed each.

A rung turns the configuration as given into its own, or says why it does not apply. Nothing else
changes, so that a pair of trials of one seed differs by that thing alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from stability_search.diagnose.task_code import task_code
from stability_search.errors import UsageError
from stability_search.records.values import Json
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TrialConfig
from stability_search.tasks.base import HasAblations
from stability_search.tasks.loading import load_task

LOGIT_CAP = 30.0  # tanh leaves smaller logits nearly alone, and fp16 is far from its end
LOW_SCALE = 1024.0
LONGER_INTERVAL = 10  # times the growth interval as given
TENTH = 0.1
SMALL_BATCH = 4  # up to so many samples BatchNorm's statistics are those of a few


class RungName(StrEnum):
    """Every rung; the first nine are the field's checklist, in its order."""

    AS_GIVEN = "as_given"
    FP32 = "fp32"
    ATTENTION_BYPASSED = "attention_bypassed"
    ATTENTION_FP32 = "attention_fp32"
    LOWER_SCALE = "lower_scale"
    SMALLER_MODEL = "smaller_model"
    RATE_TENTH = "rate_tenth"
    BATCH_SIZE_1 = "batch_size_1"
    GROUP_NORM = "group_norm"
    BATCHES_LEFT_OUT = "batches_left_out"
    LONGER = "longer"
    RATE_HUNDREDTH = "rate_hundredth"
    RATE_THOUSANDTH = "rate_thousandth"
    LOGIT_CAP = "logit_cap"
    BF16 = "bf16"


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """The configuration of a rung.

    Attributes:
        config: What is trained.
        changes: The settings it changes, as a space file names them.
    """

    config: TrialConfig
    changes: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """Why a rung does not apply."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One thing to leave out or change.

    Attributes:
        name: Its name in `diagnosis.json`.
        title: What it does, in a few words.
        build: Turns the configuration as given into its own, or says why it does not apply.
    """

    name: RungName
    title: str
    build: Callable[[TrialConfig], Variant | LeftOut]


def _changed(config: TrialConfig, **settings: Any) -> Variant:  # noqa: ANN401 - of any setting
    """Change settings of the engine or the trial."""
    names = set(EngineSettings.__dataclass_fields__)
    engine = {name: value for name, value in settings.items() if name in names}
    trial = {name: value for name, value in settings.items() if name not in names}
    changed = replace(config, engine=replace(config.engine, **engine), **trial)
    return Variant(config=changed, changes=settings)


def _as_given(config: TrialConfig) -> Variant:
    return Variant(config=config)


def _fp32(config: TrialConfig) -> Variant | LeftOut:
    if config.engine.precision == "fp32":
        return LeftOut(reason="it already trains in fp32")
    return _changed(config, precision="fp32")


def _bf16(config: TrialConfig) -> Variant | LeftOut:
    if config.engine.precision == "bf16":
        return LeftOut(reason="it already trains in bf16")
    return _changed(config, precision="bf16")


def _attention_fp32(config: TrialConfig) -> Variant | LeftOut:
    if config.engine.precision == "fp32":
        return LeftOut(reason="it already trains in fp32")
    if config.engine.attention_precision == "fp32":
        return LeftOut(reason="attention is already computed in fp32")
    return _changed(config, attention_precision="fp32")


def _lower_scale(config: TrialConfig) -> Variant | LeftOut:
    if not config.engine.has_loss_scaling:
        return LeftOut(reason=f"{config.engine.precision} has no loss scale")
    scale = LOW_SCALE if config.engine.init_scale > LOW_SCALE else config.engine.init_scale / 64
    interval = config.engine.growth_interval * LONGER_INTERVAL
    return _changed(config, init_scale=max(1.0, scale), growth_interval=interval)


def _logit_cap(config: TrialConfig) -> Variant | LeftOut:
    cap = config.engine.attention_logit_cap
    if cap is not None and cap <= LOGIT_CAP:
        return LeftOut(reason=f"the attention logits are already capped at {cap:g}")
    return _changed(config, attention_logit_cap=LOGIT_CAP)


def _rate(factor: float) -> Callable[[TrialConfig], Variant]:
    def build(config: TrialConfig) -> Variant:
        return _changed(config, learning_rate=float(f"{config.engine.learning_rate * factor:.6g}"))

    return build


def _batch_size_1(config: TrialConfig) -> Variant | LeftOut:
    if config.batch_size == 1:
        return LeftOut(reason="the batch size is already 1")
    return _changed(config, batch_size=1)


def _group_norm(config: TrialConfig) -> Variant | LeftOut:
    if config.engine.norm == "group":
        return LeftOut(reason="BatchNorm has already become GroupNorm")
    return _changed(config, norm="group")


def _without(part: str) -> Callable[[TrialConfig], Variant | LeftOut]:
    """Build the task without a part of it, as its `ablations` say."""

    def build(config: TrialConfig) -> Variant | LeftOut:
        task = load_task(config.task, config.task_args)
        if not isinstance(task, HasAblations):
            return LeftOut(reason="the task has no `ablations`, so nobody knows how to")
        with task_code("ablations()"):
            changes = task.ablations().get(part)
        if changes is None:
            return LeftOut(reason=f"the task's `ablations` have no `{part}`: not there, or done")
        ablated = replace(config, task_args={**config.task_args, **changes})
        if part == RungName.ATTENTION_BYPASSED:  # settings for attention would find none
            off: dict[str, Any] = {"attention_clamp": None, "attention_logit_cap": None}
            off |= {"attention_precision": "trial", "attention_modules": ()}
            ablated = replace(ablated, engine=replace(config.engine, **off))
        return Variant(config=ablated, changes=dict(changes))

    return build


def longer(config: TrialConfig, factor: int) -> TrialConfig:
    """Return the same configuration over so many times the steps."""
    steps = config.num_planned_steps * factor
    return replace(
        config,
        num_planned_steps=steps,
        engine=replace(config.engine, num_planned_steps=steps),
        timeout_s=config.timeout_s * factor,
    )


AS_GIVEN = Rung(name=RungName.AS_GIVEN, title="as given", build=_as_given)
FP32 = Rung(name=RungName.FP32, title="fp32 instead", build=_fp32)
BYPASSED = Rung(
    name=RungName.ATTENTION_BYPASSED,
    title="attention bypassed",
    build=_without(RungName.ATTENTION_BYPASSED),
)
ATTENTION_FP32 = Rung(
    name=RungName.ATTENTION_FP32, title="attention alone in fp32", build=_attention_fp32
)
LOWER_SCALE = Rung(
    name=RungName.LOWER_SCALE,
    title="lower scale, longer growth interval",
    build=_lower_scale,
)
SMALLER = Rung(
    name=RungName.SMALLER_MODEL, title="smaller model", build=_without(RungName.SMALLER_MODEL)
)
TENTH_RATE = Rung(name=RungName.RATE_TENTH, title="learning rate / 10", build=_rate(TENTH))
ONE_SAMPLE = Rung(name=RungName.BATCH_SIZE_1, title="batch size 1", build=_batch_size_1)
GROUP_NORM = Rung(
    name=RungName.GROUP_NORM, title="GroupNorm instead of BatchNorm", build=_group_norm
)
CAP = Rung(
    name=RungName.LOGIT_CAP, title=f"attention logits capped at {LOGIT_CAP:g}", build=_logit_cap
)
BF16 = Rung(name=RungName.BF16, title="bf16 instead of fp16", build=_bf16)
LEFT_OUT = Rung(
    name=RungName.BATCHES_LEFT_OUT, title="suspicious batches left out", build=_as_given
)

CHECKLIST = (
    FP32,
    BYPASSED,
    ATTENTION_FP32,
    LOWER_SCALE,
    SMALLER,
    TENTH_RATE,
    ONE_SAMPLE,
    GROUP_NORM,
)
DEEPER_RATES = (
    Rung(name=RungName.RATE_HUNDREDTH, title="learning rate / 100", build=_rate(TENTH**2)),
    Rung(name=RungName.RATE_THOUSANDTH, title="learning rate / 1000", build=_rate(TENTH**3)),
)
RATES = (TENTH_RATE, *DEEPER_RATES)


def apply(rung: Rung, config: TrialConfig) -> Variant | LeftOut:
    """Build the configuration of a rung, or say why it does not apply."""
    try:
        return rung.build(config)
    except UsageError as error:
        return LeftOut(reason=str(error))
