"""What the report is drawn from, and the one place where its rows become plain values."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import isclose, log2
from pathlib import Path
from typing import Any

from stability_search.privacy import Privacy
from stability_search.records.step import StepRecord
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict
from stability_search.report.curves import Curves, read_curves
from stability_search.settings.engine import EngineSettings
from stability_search.settings.study import StudySettings
from stability_search.standing import LADDER_SEEDS
from stability_search.table import STABLE_Q, Tables, records
from stability_search.yardstick import Yardstick

Row = Mapping[str, Any]

_ENGINE_DEFAULTS = EngineSettings(learning_rate=1.0)
# Words of ours, which a host may be named like; a trial's steps are read by its name.
_OURS = frozenset({"trial_id", "stage", "config_id", "candidate_id", "outcome", "control_outcome"})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Report:
    """Everything the page, the summary and the terminal say about one study.

    Attributes:
        tables: What `build_tables` returned.
        verdict: How the study ended.
        study: The study's blocks.
        yardsticks: What `study_yardsticks` returned, by horizon.
        space_text: The space file as it was run.
        task_name: The task as it is written in the space file.
        device: `cpu`, or the name of the GPU.
        environment: Versions, seeds and the like, shown in the appendix; holds no secret.
        start_config_ids: The `start_with` configurations, today's first.
        setting_names: Every setting of the space, in its order.
        varying: Those that vary.
        command: The command line that made the run.
        run_directory: The run directory as the reader will type it.
        read_steps: Reads the step records of a trial by its id; None where there are none.
        home: Home directory of whoever made the run, shown as `~`.
    """

    tables: Tables
    verdict: Verdict
    study: StudySettings
    yardsticks: Mapping[int, Yardstick]
    space_text: str
    task_name: str
    device: str
    environment: Mapping[str, Json] = field(default_factory=dict)
    start_config_ids: tuple[str, ...] = ()
    setting_names: tuple[str, ...]
    varying: tuple[str, ...]
    command: str = ""
    run_directory: str
    read_steps: Callable[[str], Sequence[StepRecord]] | None = None
    home: str = field(default_factory=lambda: str(Path.home()))


class RungState(StrEnum):
    """What a rung of a ladder showed."""

    HELD = "held"
    BROKE = "broke"
    LOST = "lost"  # a seed of it, to a machine or to an error of the task
    UNTRIED = "untried"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """The trials of one learning rate on a ladder.

    Attributes:
        octave: Doublings from the configuration the ladder is read from.
        learning_rate: Its rate.
        qs: Run score per seed that score and margin count; None where the end says nothing about
            stability.
        outcomes: How each of these ended.
        later: The same of the seeds that the rate had later, as the base of a ladder of its own.
            They say more of it, but rungs are compared on as many seeds as all of them had.
    """

    octave: int
    learning_rate: float
    qs: tuple[float | None, ...]
    outcomes: tuple[str, ...]
    later: "Rung | None" = None

    @property
    def num_lost(self) -> int:
        """Seeds whose end says nothing about stability."""
        return self.qs.count(None)

    @property
    def num_held(self) -> int:
        """Seeds that completed with q >= 1/2."""
        return sum(
            outcome == "completed" and q is not None and q >= STABLE_Q
            for q, outcome in zip(self.qs, self.outcomes, strict=True)
        )

    @property
    def state(self) -> RungState:
        """Judged by the seeds that say something; `lost` if those all held and others are lost."""
        if self.num_held + self.num_lost < len(self.qs):
            return RungState.BROKE
        return RungState.LOST if self.num_lost else RungState.HELD


class View:
    """The rows of a report as plain dicts, and the questions every part asks of them.

    Args:
        report: What to look at.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self.verdict = report.verdict
        self.study = report.study
        trials = records(report.tables.trials)
        nodes = sorted({row["node"] for row in trials if row["node"]})
        self._privacy = Privacy(
            home=report.home, aliases={node: f"node-{i}" for i, node in enumerate(nodes, start=1)}
        )
        self.trials: list[dict[str, Any]] = [
            {
                k: self.private(v) if k not in _OURS and isinstance(v, str) else v
                for k, v in row.items()
            }
            for row in trials
        ]
        self.configurations = records(report.tables.configurations)
        self.by_id = {row["config_id"]: row for row in self.configurations}

    def private(self, text: str) -> str:
        """Return text without the home directory and without host names."""
        return self._privacy.text(text)

    @cached_property
    def results(self) -> list[dict[str, Any]]:
        """Trials whose end says something about their configuration."""
        return [row for row in self.trials if row["is_stable"] is not None]

    @cached_property
    def curves(self) -> Curves:
        """The steps of the trials that are worth a curve, read once."""
        return read_curves(self.results, self.headline_id, self.report.read_steps)

    @cached_property
    def outcomes(self) -> Counter[str]:
        """How many trials ended each way, all stages together."""
        return Counter(row["outcome"] for row in self.trials)

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the task's metrics."""
        ends = ("metric_", "_last")
        columns = [str(name) for name in self.report.tables.trials.columns]
        return tuple(
            name[len(ends[0]) : -len(ends[1])]
            for name in columns
            if name.startswith(ends[0]) and name.endswith(ends[1])
        )

    @property
    def headline_id(self) -> str | None:
        """The configuration the card is about: the choice, or what came closest."""
        return self.verdict.choice or self.verdict.closest

    def setting(self, row: Row, name: str) -> Any:  # noqa: ANN401 - any JSON scalar
        """Return a setting of a row, or the engine's default where the space never names it."""
        return row[name] if name in row else getattr(_ENGINE_DEFAULTS, name, None)

    def settings(self, config_id: str) -> dict[str, Any]:
        """Return every setting of a configuration, in the order of the space."""
        row = self.by_id[config_id]
        values = {name: row.get(name) for name in self.report.setting_names}
        for name, value in values.items():
            if isinstance(value, str) and isinstance(getattr(_ENGINE_DEFAULTS, name, None), tuple):
                values[name] = json.loads(value)  # a list is JSON text in its column
        return values

    def in_stage(self, *stages: str) -> list[dict[str, Any]]:
        """Return the trials of some stages."""
        return [row for row in self.trials if row["stage"] in stages]

    def seeds_of(self, config_id: str) -> list[dict[str, Any]]:
        """Return the confirm trials of one configuration, the last attempt of each seed."""
        rows = [row for row in self.in_stage("confirm") if row["config_id"] == config_id]
        return list({row["seed_index"]: row for row in rows}.values())

    def line(self, row: Row) -> tuple[Any, ...]:
        """Return every setting but the learning rate: what the rungs of a ladder share."""
        return tuple(
            row.get(name) for name in self.report.setting_names if name != "learning_rate"
        )

    def ladder(self, config_id: str) -> list[dict[str, Any]]:
        """Return the confirm trials on the ladder of a configuration, `doublings` added."""
        base = self.by_id[config_id]
        rows = []
        for row in self.in_stage("confirm"):
            if self.line(row) != self.line(base) or not row.get("learning_rate"):
                continue
            doublings = log2(row["learning_rate"] / base["learning_rate"])
            if isclose(doublings, round(doublings), abs_tol=1e-6):
                rows.append({**row, "doublings": round(doublings)})
        return rows

    def rungs(self, config_id: str) -> list[Rung]:
        """Return the ladder of a configuration, a rung per learning rate, lowest first."""
        by_octave: dict[int, dict[int, dict[str, Any]]] = {}
        for row in self.ladder(config_id):
            by_octave.setdefault(row["doublings"], {})[row["seed_index"]] = row
        return [_rung(octave, list(rows.values())) for octave, rows in sorted(by_octave.items())]


def _rung(octave: int, rows: Sequence[Row]) -> Rung:
    """Return a rung; above and below the base its first seeds count, at the base all do."""
    counted = [row for row in rows if octave == 0 or row["seed_index"] < LADDER_SEEDS]
    later = [row for row in rows if row not in counted]

    def rung(of: Sequence[Row], later: Rung | None = None) -> Rung:
        return Rung(
            octave=octave,
            learning_rate=rows[0]["learning_rate"],
            qs=tuple(row["q"] for row in of),
            outcomes=tuple(row["outcome"] for row in of),
            later=later,
        )

    return rung(counted, rung(later) if later else None)
