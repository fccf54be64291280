"""What a user would pick instead: Optuna with a pruner, and random search, on final probe loss.

Every rival has as many optimizer steps as our whole study of the same task and seed executed. It
launches trials of `confirm.steps` each until the steps that they executed reach that number; a
trial that is pruned costs what it ran. It gets the same space, `start_with` first, and trains
under the same engine, which is generous: bad steps are skipped and nothing kills a trial. It
hears the true probe loss, NaN included, as from a user's script, and its choice is what its own
interface calls best.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna

from stability_search.records.values import Json, Scalar
from stability_search.search.points import active_values
from stability_search.seeding import derive_seed
from stability_search.settings.trial import KillRule, TrialConfig, TrialConstants
from stability_search.space import Parameter, Space
from stability_search.yardstick import probe_steps
from tests.benchmarks.race.ours import Finished
from tests.benchmarks.race.store import Reading, Store, Training

NUM_REPORTS = 10  # one per tenth of the horizon
NO_KILL = KillRule(bad_rate=0.999, false_kill=1e-300)  # a run of bad steps is no evidence then
OPTUNA_RIVALS = ("hyperband", "threshold", "random")


def rival_training(space: Space, values: Mapping[str, Any]) -> Training:
    """Return the training of a rival's trial: no kill rule, no loss stop.

    Args:
        space: The study's space.
        values: A value for every setting that varies and applies.
    """
    steps = space.study.confirm.steps
    config = space.trial_config(
        space.settings(values),
        seed=derive_seed(space.study.seed, "search"),
        steps=steps,
        device="cpu",
    )
    return Training(
        config=replace(config, kill_rule=NO_KILL),
        constants=TrialConstants(probe_steps=probe_steps(steps)),
    )


def suggest_values(space: Space, trial: optuna.Trial) -> dict[str, Any]:
    """Ask Optuna for every setting that varies and applies, define-by-run."""
    return active_values(space, lambda parameter: _suggest(trial, parameter))


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Scalar:
    name, low, high = parameter.name, parameter.low, parameter.high
    is_log = parameter.kind in {"loguniform", "logint"}
    if parameter.kind == "choice":
        choice: Scalar = trial.suggest_categorical(name, parameter.choices)
        return choice
    if parameter.kind in {"int", "logint"}:
        return trial.suggest_int(name, int(low), int(high), log=is_log)
    return trial.suggest_float(name, low, high, log=is_log)


@dataclass(slots=True)
class Meter:
    """What a rival has spent.

    Attributes:
        budget: Optimizer steps after which no trial is launched.
        trials: Trials launched.
        steps: Optimizer steps executed.
        train_s: Seconds they took, on one core.
    """

    budget: int
    trials: int = 0
    steps: int = 0
    train_s: float = 0.0

    @property
    def may_launch(self) -> bool:
        """True while another trial may begin."""
        return self.steps < self.budget

    def charge(self, steps: int, train_s: float) -> None:
        """Note a trial that has ended."""
        self.trials += 1
        self.steps += steps
        self.train_s += train_s


def untrained_loss(space: Space, store: Store) -> float:
    """Return the probe loss before the first step, of what is trained today, in fp32."""
    settings = space.pilot_settings()
    config: TrialConfig = space.trial_config(
        settings, seed=derive_seed(space.study.seed, "search"), steps=1, device="cpu"
    )
    constants = TrialConstants(probe_steps=(0,))
    loss = store.run(Training(config=config, constants=constants)).probe_losses[0]
    if loss is None:
        raise AssertionError("the untrained model of a race's task has a finite probe loss")
    return loss


def run_optuna(method: str, space: Space, store: Store, *, budget: int) -> Finished:
    """Run one of Optuna's methods.

    Args:
        method: One of `OPTUNA_RIVALS`.
        space: The study's space.
        store: Where trainings come from.
        budget: Optimizer steps it may launch trials for.
    """
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    seed = space.study.seed
    sampler: optuna.samplers.BaseSampler = optuna.samplers.TPESampler(seed=seed)
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if method == "random":
        sampler = optuna.samplers.RandomSampler(seed=seed)
    elif method == "hyperband":
        pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=NUM_REPORTS)
    elif method == "threshold":
        pruner = optuna.pruners.ThresholdPruner(upper=2 * untrained_loss(space, store))
    else:
        raise ValueError(f"method: one of {OPTUNA_RIVALS} must hold, but got {method!r}.")
    # Hyperband assigns brackets by the study's name, which is random unless given.
    study = optuna.create_study(sampler=sampler, pruner=pruner, study_name=f"race-{seed}")
    for start in space.start_with:
        study.enqueue_trial(dict(start))
    meter = Meter(budget)
    objective = _objective(space, store, meter)
    while meter.may_launch:
        study.optimize(objective, n_trials=1)
    choice, note = _best_of(study, space)
    return Finished(
        method=method,
        seed=seed,
        choice=choice,
        note=note,
        trials=meter.trials,
        steps=meter.steps,
        train_s=meter.train_s,
    )


def _objective(space: Space, store: Store, meter: Meter) -> Callable[[optuna.Trial], float]:
    def objective(trial: optuna.Trial) -> float:
        training = rival_training(space, suggest_values(space, trial))
        readings = store.follow(training)
        last = Reading(step=0, loss=math.nan, wall_s=0.0)
        try:
            for tenth, last in enumerate(readings, start=1):
                trial.report(last.loss, tenth)
                if trial.should_prune():
                    raise optuna.TrialPruned
        finally:
            _close(readings)
            meter.charge(last.step, last.wall_s)
        return last.loss

    return objective


def _close(readings: Iterator[Reading]) -> None:
    readings.close()  # type: ignore[attr-defined]


def _best_of(study: optuna.Study, space: Space) -> tuple[dict[str, Json] | None, str]:
    try:
        best = study.best_trial
    except ValueError as error:
        return None, f"{type(error).__name__}: {error}"
    return space.settings(best.params), f"probe loss {best.value:.4g} at the end of its trial"
