"""How a scenario runs the real trial, and what it hands back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants
from stability_search.trial import Faults, run_trial
from stability_search.yardstick import probe_steps

TASKS = "tests.scenarios.tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What one scenario showed with one seed.

    Attributes:
        seed: The seed.
        is_guard_shown: True if every fault of the recipe showed the guard named for it.
        is_sign_absent: True if the same recipe without the fault did not show it.
        fixes: By name, whether each fix named for it survived; at least one.
        figures: What was seen, in a few words.
    """

    seed: int
    is_guard_shown: bool
    is_sign_absent: bool
    fixes: Mapping[str, bool]
    figures: str

    @property
    def holds(self) -> bool:
        """True if the guard showed, only where it should, and every fix survived."""
        return self.is_guard_shown and self.is_sign_absent and all(self.fixes.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One trial, step by step and in sum."""

    records: tuple[StepRecord, ...]
    summary: TrialSummary

    @property
    def has_survived(self) -> bool:
        """True if it reached its horizon without one bad step."""
        return self.summary.outcome is Outcome.COMPLETED and self.summary.num_bad_steps == 0

    @property
    def has_learned(self) -> bool:
        """True if the last probe reading is below the first."""
        first, last = self.summary.probe_losses[0], self.summary.probe_losses[-1]
        return first is not None and last is not None and last < first

    @property
    def labels(self) -> set[StepLabel]:
        """Every label that a step got."""
        return {record.label for record in self.records}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A training to run with several seeds and settings.

    Attributes:
        task_class: A class of `module`.
        module: Where it is.
        steps: Optimizer steps, the horizon.
        batch_size: Samples of a micro-batch.
        accumulation_steps: Micro-batches of a step.
        task_args: Arguments of the task.
        engine: Engine settings, `learning_rate` included.
    """

    task_class: str
    module: str = TASKS
    steps: int
    batch_size: int = 16
    accumulation_steps: int = 1
    task_args: Mapping[str, Any] = field(default_factory=dict)
    engine: Mapping[str, Any]

    def config(
        self, seed: int, task_args: Mapping[str, Any] | None = None, **engine: object
    ) -> TrialConfig:
        """Return the configuration with some settings of its own."""
        settings: dict[str, Any] = {**self.engine, **engine}
        return TrialConfig(
            task=TaskReference(module=self.module, class_name=self.task_class),
            task_args={**self.task_args, **(task_args or {})},
            engine=EngineSettings(num_planned_steps=self.steps, **settings),
            batch_size=self.batch_size,
            accumulation_steps=self.accumulation_steps,
            num_planned_steps=self.steps,
            seed=seed,
        )


def run(
    config: TrialConfig,
    constants: TrialConstants | None = None,
    *,
    faults: Faults | None = None,
) -> Run:
    """Run one trial to its end.

    Args:
        config: What to run.
        constants: Yardstick and probe steps; None for the tenths of the horizon, without a Delta
            and so without the loss stop.
        faults: What is planted into it.

    Raises:
        AssertionError: The scenario itself is broken: the trial ended for an error of its task.
    """
    unknown = TrialConstants(probe_steps=probe_steps(config.num_planned_steps))
    steps = run_trial(config, constants=constants or unknown, faults=faults)
    records = []
    while True:
        try:
            records.append(next(steps).record)
        except StopIteration as end:
            summary: TrialSummary = end.value
            break
    assert summary.outcome.is_result, summary.error_text
    return Run(records=tuple(records), summary=summary)
