"""Optuna's TPE over the proposals of a study, in memory, finite numbers only."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stability_search.records.values import Scalar
from stability_search.search.points import active_values, choice_index
from stability_search.space import Parameter, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import TPESampler
    from optuna.trial import Trial

CONSTRAINT = "stability"  # feasible when <= 0

_SEED_32 = 2**32  # Optuna's samplers take 32-bit seeds


class TpeStudy:
    """What TPE has heard of: proposals in flight and results, in the order they were added.

    A draw leaves nothing behind but a failed trial, which TPE ignores; so what it gives depends
    only on its seed and on what was added and told.

    Args:
        space: What varies.
    """

    def __init__(self, space: Space) -> None:
        """Begin with an empty study."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._storage = optuna.storages.InMemoryStorage()
        self._study = optuna.create_study(storage=self._storage, direction="maximize")
        self._study_id = self._storage.get_study_id_from_name(self._study.study_name)

    def add(self, values: Mapping[str, Any]) -> int:
        """Add a proposal in flight, which TPE avoids repeating; return its number."""
        from optuna.trial import TrialState, create_trial

        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for parameter in self._space.parameters:
            if parameter.name in values:
                value = values[parameter.name]
                is_choice = parameter.kind == "choice"
                params[parameter.name] = choice_index(parameter, value) if is_choice else value
                distributions[parameter.name] = _by_position(parameter)
        running = create_trial(
            state=TrialState.RUNNING, params=params, distributions=distributions
        )
        return self._storage.create_new_trial(self._study_id, running)

    def finish(self, number: int, *, value: float, constraint: float) -> None:
        """Tell the result of a proposal; both numbers must be finite."""
        from optuna.trial import Trial, TrialState

        # The constraint first: a finished trial takes none.
        Trial(self._study, number).set_constraint(CONSTRAINT, constraint)
        self._storage.set_trial_state_values(number, TrialState.COMPLETE, [value])

    def drop(self, number: int) -> None:
        """Tell that nothing was learned from a proposal: what Optuna calls FAIL, and ignores."""
        from optuna.trial import TrialState

        self._storage.set_trial_state_values(number, TrialState.FAIL)

    def draw(self, seed: int) -> dict[str, Any]:
        """Draw values for every active parameter from what was added and told."""
        from optuna.trial import TrialState

        self._study.sampler = _sampler(seed % _SEED_32)
        trial = self._study.ask()
        values = active_values(self._space, lambda parameter: _suggest(trial, parameter))
        self._study.tell(trial, state=TrialState.FAIL)
        return values


def distribution(parameter: Parameter) -> "BaseDistribution":
    """Return a parameter's distribution as people read it."""
    from optuna.distributions import CategoricalDistribution

    if parameter.kind == "choice":
        return CategoricalDistribution(parameter.choices)
    return _by_position(parameter)


def _sampler(seed: int) -> "TPESampler":
    import optuna

    with warnings.catch_warnings():
        # `group` is marked experimental; constraints.txt pins the version that is tested.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=0, multivariate=True, group=True, constant_liar=True
        )


def _suggest(trial: "Trial", parameter: Parameter) -> Scalar:
    name, low, high = parameter.name, parameter.low, parameter.high
    is_log = parameter.kind in {"loguniform", "logint"}
    match parameter.kind:
        case "choice":
            return parameter.choices[
                trial.suggest_categorical(name, range(len(parameter.choices)))
            ]
        case "int" | "logint":
            return trial.suggest_int(name, int(low), int(high), log=is_log)
        case _:
            return trial.suggest_float(name, low, high, log=is_log)


def _by_position(parameter: Parameter) -> "BaseDistribution":
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    is_log = parameter.kind in {"loguniform", "logint"}
    match parameter.kind:
        case "choice":  # by position: Optuna takes 1, 1.0 and True for one choice
            return CategoricalDistribution(range(len(parameter.choices)))
        case "int" | "logint":
            return IntDistribution(int(parameter.low), int(parameter.high), log=is_log)
        case _:
            return FloatDistribution(parameter.low, parameter.high, log=is_log)
