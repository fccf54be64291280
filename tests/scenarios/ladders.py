"""Runs of one seed at several learning rates, scored as a study scores them.

The rows are those a study would keep: one pilot trial that gives the start, confirm trials that
give q. Yardstick, q, S and margin are the package's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stability_search.records.trial import Stage, TrialRow
from stability_search.records.values import Json
from stability_search.settings.study import ConfirmSettings, StudySettings
from stability_search.settings.trial import TrialConstants, config_id
from stability_search.standing import ConfigurationStanding, configuration_standing
from stability_search.yardstick import Yardstick, pilot_yardstick, probe_steps, yardstick
from tests.scenarios.running import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladder:
    """Trials of one horizon.

    Attributes:
        horizon: Their planned steps.
        pilot: Runs that fix the yardstick, by learning rate.
        runs: Runs to score, by the name of a recipe and the learning rate.
    """

    horizon: int
    pilot: Mapping[float, Run]
    runs: Mapping[tuple[str, float], Run]

    @property
    def yardstick(self) -> Yardstick:
        """Return E_0, E* and Delta, refitted to every run."""
        return yardstick([*_pilot_rows(self.pilot), *self._rows()], self.horizon)

    def standing(self, recipe: str, rate: float, *, octaves: int) -> ConfigurationStanding:
        """Return q, P, S and margin of one recipe at one rate, of one seed."""
        return configuration_standing(
            self._rows(),
            {"recipe": recipe, "learning_rate": rate},
            study=StudySettings(
                name="scenario", confirm=ConfirmSettings(seeds=1, octaves=octaves)
            ),
            yardstick=self.yardstick,
            seed_indices=[0],
        )

    def _rows(self) -> list[TrialRow]:
        return [
            _row(Stage.CONFIRM, index, recipe, rate, trial)
            for index, ((recipe, rate), trial) in enumerate(self.runs.items())
        ]


def constants_after(pilot: Mapping[float, Run], horizon: int) -> TrialConstants:
    """Return what the pilot fixes for the trials after it."""
    known = pilot_yardstick(_pilot_rows(pilot), horizon)
    return TrialConstants(e0=known.e0, delta=known.delta, probe_steps=probe_steps(horizon))


def _pilot_rows(pilot: Mapping[float, Run]) -> Sequence[TrialRow]:
    return [
        _row(Stage.PILOT, index, "pilot", rate, trial)
        for index, (rate, trial) in enumerate(pilot.items())
    ]


def _row(stage: Stage, index: int, recipe: str, rate: float, trial: Run) -> TrialRow:
    settings: dict[str, Json] = {"recipe": recipe, "learning_rate": rate}
    return TrialRow(
        trial_id=f"{stage.value}-{index}",
        stage=stage,
        index=index,
        config_id=config_id(settings),
        seed=0,
        settings=settings,
        summary=trial.summary,
    )
