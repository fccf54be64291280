"""The overfit test: a handful of samples must be learned by heart before the long run begins.

One window of micro-batches is drawn once and repeated. Every few steps the model is judged on
those very samples, in eval mode: error rates must reach 0, accuracies 1 (of the unit [0, 1]; one
that ever exceeds 1 is in per cent and must reach 100). Where there is neither,
the loss must fall to a tenth. Since BatchNorm behaves otherwise in training, what the model makes
of the samples with the batches' own statistics is measured too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stability_search.assembly import build_engine, training_stream
from stability_search.diagnose.ends import REFERENCE_FAULT
from stability_search.engine import GuardedEngine
from stability_search.probe import probe_loss, read_metrics, read_probe
from stability_search.records.step import StepLabel, StepRecord
from stability_search.settings.trial import TrialConfig
from stability_search.tally import mean_or_none
from stability_search.tasks.base import HasBaseline, HasMetrics, Task
from stability_search.tasks.loading import load_task

SCHEMA = "stability-search/overfit/1"
STEPS_FACTOR = 5  # times the steps of a trial: learning by heart takes longer than a first look
MIN_STEPS = 500
READINGS = 50  # of the samples, over the whole test
LOSS_SHARE = 0.1  # of the loss without progress, where a task measures nothing else
PER_CENT = 100.0
_SLACK = 1e-9
_ABOVE_SHARE = 1.0 + 1e-6  # no share is as large, rounding in fp32 included
_SLOW_RATE = 1e-4  # below it, a slow course most likely needs a higher rate

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What one number must reach.

    Attributes:
        name: The metric, or `loss`.
        limit: The value.
        is_upper: True if it must fall to the limit, False if it must rise to it.
    """

    name: str
    limit: float
    is_upper: bool

    def is_met(self, value: float | None) -> bool:
        """Say whether a reading is there; None, which stands for NaN, never is."""
        if value is None:
            return False
        return value <= self.limit + _SLACK if self.is_upper else value >= self.limit - _SLACK

    def __str__(self) -> str:
        """Say it as a person would."""
        return f"{self.name} {'at most' if self.is_upper else 'at least'} {self.limit:.3g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overfit:
    """What the overfit test showed.

    Attributes:
        has_passed: True if every goal was met in eval mode without a bad step.
        num_steps: Steps taken: until it was met, or until the test gave up.
        num_samples_batches: Micro-batches that were repeated.
        batch_size: Samples of each.
        goals: What had to be reached, in words.
        first: Readings of the untrained model, by name.
        last: Readings at the end, in eval mode.
        last_with_batch_statistics: The same with BatchNorm as in training; empty without one.
        bad_step: First bad step; None if there was none.
        reason: Why it did not pass; empty if it did.
        advice: What to try; empty if it passed.
        notes: What a reader must know beside it, one sentence each.
    """

    has_passed: bool
    num_steps: int
    num_samples_batches: int
    batch_size: int
    goals: tuple[str, ...]
    first: Mapping[str, float | None]
    last: Mapping[str, float | None]
    last_with_batch_statistics: Mapping[str, float | None] = field(default_factory=dict)
    bad_step: int | None = None
    reason: str = ""
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 if it passed, else 3."""
        return 0 if self.has_passed else 3

    def to_json(self) -> str:
        """Return strict JSON: no NaN, no Infinity."""
        document = {"schema": SCHEMA, **asdict(self)}
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    def lines(self) -> list[str]:
        """Return what the terminal shows."""
        what = f"{self.num_samples_batches} x {self.batch_size} samples"
        goal = " and ".join(self.goals)
        readings = ", ".join(f"{name} {_short(value)}" for name, value in self.last.items())
        if self.has_passed:
            head = f"overfit: passed: {what} learned by heart ({goal}) in {self.num_steps} steps"
        else:
            head = f"overfit: not passed after {self.num_steps} steps: {self.reason}"
        lines = [head, f"at the end, in eval mode: {readings}"]
        if self.last_with_batch_statistics and not self.has_passed:
            other = ", ".join(
                f"{name} {_short(value)}"
                for name, value in self.last_with_batch_statistics.items()
            )
            lines.append(f"with BatchNorm as in training: {other}")
        lines += [f"goal: {goal}, for {what}"] if not self.has_passed else []
        lines += [f"try: {text}" for text in self.advice]
        return [*lines, *self.notes]


def overfit(config: TrialConfig, *, say: Say, check: Callable[[], None]) -> Overfit:
    """Train on one window of samples until they are known by heart.

    Args:
        config: What is trained, as given; its horizon is stretched to at least 500 steps.
        say: Takes a line per reading that is worth one.
        check: Called between steps; may raise to stop.

    Returns:
        Whether they were, in how many steps, or where it got stuck.

    Raises:
        UsageError: Model or device cannot honour a setting.
        Exception: Whatever the task raises that is no numerical failure.
    """
    from stability_search.diagnose.rungs import longer

    factor = max(STEPS_FACTOR, -(-MIN_STEPS // config.num_planned_steps))
    return _Test(longer(config, factor), say, check).run()


class _Test:
    """The parts of one overfit test."""

    def __init__(self, config: TrialConfig, say: Say, check: Callable[[], None]) -> None:
        self.config = config
        self.task: Task = load_task(config.task, config.task_args)
        self.notes: list[str] = []
        self._per_cent: set[str] = set()
        self._say = say
        self._check = check

    def run(self) -> Overfit:
        config, device = self.config, torch.device(self.config.device)
        with build_engine(self.task, config.engine, seed=config.seed, device=device) as engine:
            stream = training_stream(
                self.task, batch_size=config.batch_size, seed=config.seed, device=device
            )
            window = [next(stream) for _ in range(config.accumulation_steps)]
            first = self._read(engine, window)
            goals = self._goals(first)
            return self._train(engine, window, goals, first)

    def _train(
        self,
        engine: GuardedEngine,
        window: list[Any],
        goals: list[Goal],
        first: Mapping[str, float | None],
    ) -> Overfit:
        steps = self.config.num_planned_steps
        every = max(1, steps // READINGS)
        readings, broken = dict(first), None
        for step in range(1, steps + 1):
            self._check()
            record = engine.step(window, self.task.loss)
            if record.label in {StepLabel.BAD, StepLabel.DATA} or engine.ended is not None:
                broken = record
                break
            if step % every and step != steps:
                continue
            readings = self._read(engine, window)
            if step % (10 * every) == 0:
                words = ", ".join(f"{name} {_short(value)}" for name, value in readings.items())
                self._say(f"step {step}: {words}")
            goals = self._in_their_unit(goals)
            if all(goal.is_met(readings.get(goal.name)) for goal in goals):
                break
        return self._result(engine, window, goals, first, readings, broken)

    def _result(  # noqa: PLR0913, PLR0917 - what was seen
        self,
        engine: GuardedEngine,
        window: list[Any],
        goals: list[Goal],
        first: Mapping[str, float | None],
        last: Mapping[str, float | None],
        broken: StepRecord | None,
    ) -> Overfit:
        has_passed = broken is None and all(g.is_met(last.get(g.name)) for g in goals)
        as_trained: dict[str, float | None] = {}
        if not has_passed and broken is None and _has_batch_norm(engine.model):
            as_trained = self._read(engine, window, with_batch_statistics=True)
            goals = self._in_their_unit(goals)
        reason, advice = "", tuple[str, ...]()
        if not has_passed:
            is_fit = bool(as_trained) and all(g.is_met(as_trained.get(g.name)) for g in goals)
            reason, advice = self._why(first, last, broken, is_fit_in_training=is_fit)
        return Overfit(
            has_passed=has_passed,
            num_steps=engine.num_steps,
            num_samples_batches=len(window),
            batch_size=self.config.batch_size,
            goals=tuple(map(str, goals)),
            first=first,
            last=last,
            last_with_batch_statistics=as_trained,
            bad_step=broken.step if broken else None,
            reason=reason,
            advice=advice,
            notes=tuple(self.notes),
        )

    def _why(
        self,
        first: Mapping[str, float | None],
        last: Mapping[str, float | None],
        broken: StepRecord | None,
        *,
        is_fit_in_training: bool,
    ) -> tuple[str, tuple[str, ...]]:
        if broken is not None:
            where = f", first seen in {broken.first_nonfinite_module}" * bool(
                broken.first_nonfinite_module
            )
            reason = f"step {broken.step} was {broken.label.value}: {broken.reason}{where}"
            if broken.label is StepLabel.DATA and broken.reason.startswith(REFERENCE_FAULT):
                return reason, ("look at the task's loss and model: the samples are finite",)
            if broken.label is StepLabel.DATA:
                return reason, ("mend these samples: the batch itself is at fault",)
            return reason, (
                "`stability-search diagnose` without --overfit, which names the cause",
            )
        if is_fit_in_training:
            reason = "the samples are known by heart with each batch's own statistics, "
            reason += "not with BatchNorm's running ones"
            return reason, ("--set fixed.norm=group", "a larger batch")
        rate = self.config.engine.learning_rate
        if _has_halved(first, last):
            return "it is learning, but slowly", (
                f"more steps: trial.steps above {self.config.num_planned_steps // STEPS_FACTOR}",
                f"a higher rate than {rate:g}",
                "no dropout and no weight decay, for this test alone",
            )
        higher = (f"a higher rate than {rate:g}",) if rate < _SLOW_RATE else ()
        lower = () if rate < _SLOW_RATE else (f"a lower rate than {rate:g}", "a higher one")
        return "it got stuck", (
            *higher,
            *lower,
            "labels and inputs of these samples: do they belong together?",
            "no dropout and no weight decay, for this test alone",
        )

    # -- readings ------------------------------------------------------------------------------

    def _read(
        self, engine: GuardedEngine, window: list[Any], *, with_batch_statistics: bool = False
    ) -> dict[str, float | None]:
        """Measure loss and metrics on the very samples, in eval mode."""
        if not with_batch_statistics:
            loss = mean_or_none(read_probe(engine, self.task, window))
            return {"loss": loss, **self._metrics(engine, window)}
        losses: list[float | None] = []
        rows: list[Mapping[str, float]] = []

        def read(model: nn.Module) -> None:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.train()
            for batch in window:
                value = float(probe_loss(self.task, model, batch))
                losses.append(value if value == value else None)  # noqa: PLR0124 - NaN alone differs
                if isinstance(self.task, HasMetrics):
                    rows.append(self.task.metrics(model, batch))

        engine.measure(read)
        self._note_per_cent(rows)
        names = rows[0] if rows else {}
        metrics = {name: mean_or_none([row.get(name) for row in rows]) for name in names}
        return {"loss": mean_or_none(losses), **metrics}

    def _metrics(self, engine: GuardedEngine, window: list[Any]) -> dict[str, float | None]:
        """Return the means of the metrics, and note which accuracies are in per cent.

        Each batch is looked at by itself: a mean of per cents may be 1, as a share may be.
        """
        rows = [read_metrics(engine, self.task, [batch]) for batch in window]
        self._note_per_cent(rows)
        return {name: mean_or_none([row.get(name) for row in rows]) for name in rows[0]}

    def _note_per_cent(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        self._per_cent |= {
            name
            for row in rows
            for name, value in row.items()
            if name.endswith("accuracy") and value is not None and value > _ABOVE_SHARE
        }

    def _in_their_unit(self, goals: list[Goal]) -> list[Goal]:
        """Return the goals, those of accuracies in per cent raised to 100."""
        found = [
            replace(goal, limit=PER_CENT) if goal.name in self._per_cent else goal
            for goal in goals
        ]
        self.notes += [
            f"`{now.name}` was above 1, so it is in per cent, and its goal is {now.limit:g}. "
            "Measure it from 0 to 1: a reading of 1 per cent cannot be told from all of them."
            for was, now in zip(goals, found, strict=True)
            if was != now
        ]
        return found

    def _goals(self, first: Mapping[str, float | None]) -> list[Goal]:
        goals = [
            Goal(name=name, limit=0.0, is_upper=True)
            for name in first
            if name.endswith("error_rate")
        ]
        goals += [
            Goal(name=name, limit=1.0, is_upper=False)
            for name in first
            if name.endswith("accuracy")
        ]
        if goals:
            return self._in_their_unit(goals)
        self.notes.append(
            "The task measures neither an error rate nor an accuracy: the loss is judged. Give it "
            "`metrics` with a name that ends in `error_rate` or `accuracy` for a sharper test."
        )
        start = first["loss"]
        known = [] if start is None else [start]
        if isinstance(self.task, HasBaseline):
            known.append(float(self.task.baseline()))
        level = min(known, default=0.0)
        return [Goal(name="loss", limit=LOSS_SHARE * level, is_upper=True)]


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _has_halved(first: Mapping[str, float | None], last: Mapping[str, float | None]) -> bool:
    before, after = first.get("loss"), last.get("loss")
    return before is not None and after is not None and after < before / 2


def _short(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.4g}"
