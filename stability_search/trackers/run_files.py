"""What trackers read of a run directory: its space, its step files and its report."""

import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from stability_search import space as spaces
from stability_search.files import write_whole
from stability_search.inert import plain
from stability_search.privacy import Privacy
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Stage, TrialRow
from stability_search.records.values import Json, Scalar
from stability_search.scalars import safe_name, step_scalars
from stability_search.scoring.run import probe_levels
from stability_search.settings.study import StudySettings
from stability_search.space import Parameter
from stability_search.step_files import read_row, read_steps
from stability_search.trackers.base import StepScalars, StudyEnd, StudyLog, TrialLog
from stability_search.yardstick import readings

# As `search.run_directory` names them; a test holds the two to each other.
SPACE_FILE = "space.yaml"
STEPS_FOLDER = "steps"
TRIALS_FILE = "trials.parquet"
REPORT_DOCUMENT = "report.json"
ARTIFACTS = ("report.html", REPORT_DOCUMENT, "best.yaml")
ID_FILE = "trackers.json"

MAX_POINTS = 1000  # of one curve, as many as TensorBoard keeps; every bad step is kept
MAX_SEARCH_CURVES = 1000  # search trials with curves; those after have their final numbers only
_MAX_TEXT = 500
_CHOICE_NUMBERS = (
    "score", "q_lower", "margin_octaves", "num_seeds", "num_planned_steps", "num_bad_steps",
    "num_judged_steps", "bad_rate_bound", "ceiling", "calm", "smooth", "kept", "progress",
)  # fmt: skip
_SUMMARY_NUMBERS = (
    "num_steps", "num_planned_steps", "num_judged_steps", "num_bad_steps",
    "num_calibration_steps", "num_data_steps", "first_bad_step", "evidence", "final_scale",
    "grad_norm_median", "grad_norm_max", "clip_frac", "attention_max", "clamp_frac", "cap_frac",
    "baseline", "peak_memory_mib", "train_s", "wall_s",
)  # fmt: skip
_SUMMARY_TEXTS = (
    "outcome", "reason", "device", "fp16_kind", "first_nonfinite_module",
    "first_nonfinite_phase", "error_type",
)  # fmt: skip


def newest_attempt(directory: Path, trial_id: str) -> str:
    """Return the name of the last step file that was written of a trial."""
    name, attempt = trial_id, 2
    while (directory / STEPS_FOLDER / f"{trial_id}-attempt{attempt}.parquet").is_file():
        name, attempt = f"{trial_id}-attempt{attempt}", attempt + 1
    return name


def trial_names(directory: Path) -> list[str]:
    """Return the names of all step files, in the order in which they were written."""
    paths = (directory / STEPS_FOLDER).glob("[!.]*.parquet")
    return [path.stem for path in sorted(paths, key=lambda path: (path.stat().st_mtime, path))]


def study_id(directory: Path) -> str:
    """Return the id of a study; the first call makes it and keeps it in the run directory.

    Raises:
        StoppedEarlyError: It could not be kept.
    """
    path = directory / ID_FILE
    known = _read_json(path).get("study_id")
    if isinstance(known, str) and re.fullmatch("[0-9a-f]{32}", known):
        return known
    made = uuid.uuid4().hex
    write_whole(path, json.dumps({"study_id": made}) + "\n")
    return made


class RunFiles:
    """Reads the files of one run, as trackers are told of them.

    Args:
        directory: The run directory.

    Raises:
        UsageError: Its space cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._space = spaces.load(directory / SPACE_FILE)
        self._scores = dict(_written_scores(directory / TRIALS_FILE))
        self._privacy = Privacy(home=str(Path.home()), aliases={})

    def study(self, study_id: str) -> StudyLog:
        """Return the study."""
        study = self._space.study
        facts = {
            "task": self._space.task_name,
            "seed": str(study.seed),
            "trial_steps": str(study.trial_steps),
            "confirm_steps": str(study.confirm.steps),
            "search_trials": str(study.search.trials if self._space.has_space else 0),
        }
        return StudyLog(
            directory=self._directory,
            study_id=study_id,
            name=study.name,
            facts={name: self._text(value) for name, value in facts.items()},
            parameters=tuple(map(self._parameter, self._space.parameters)),
        )

    def trial(self, name: str, q: float | None) -> TrialLog:
        """Return one finished trial.

        Args:
            name: Name of its step file.
            q: Its run score as the study told it; None takes what the tables say.

        Raises:
            DamagedStepFileError: The step file cannot be read.
        """
        path = self._directory / STEPS_FOLDER / f"{name}.parquet"
        row = read_row(path)
        has_curve = row.stage is not Stage.SEARCH or row.index < MAX_SEARCH_CURVES
        started_s = _seconds(row.started_at)
        score = self._scores.get((row.trial_id, row.attempt)) if q is None else q
        return TrialLog(
            name=name,
            stage=row.stage.value,
            outcome=row.summary.outcome.value,
            settings=self._settings(row.settings),
            numbers=_numbers(row, self._space.study, score),
            texts=dict(self._texts(row)),
            started_s=started_s,
            ended_s=started_s + row.summary.wall_s,
            num_steps=row.summary.num_steps,
            curve=curve(read_steps(path), started_s) if has_curve else (),
        )

    def end(self, verdict: str, exit_code: int) -> StudyEnd:
        """Return how the study ended, with its choice as `report.json` has it."""
        document = _read_json(self._directory / REPORT_DOCUMENT)
        best: Mapping[str, Any] = document.get("best") or {}
        numbers: dict[str, Any] = {name: best.get(name) for name in _CHOICE_NUMBERS}
        files = (self._directory / name for name in ARTIFACTS)
        return StudyEnd(
            verdict=verdict,
            exit_code=exit_code,
            reason=self._text(str(document.get("reason") or "")),
            choice=self._text(str(best.get("config_id") or "")),
            margin=_margin(best),
            settings=self._settings(best.get("settings", {})),
            numbers={key: value for key, value in numbers.items() if _is_number(value)},
            files=tuple(path for path in files if path.is_file()),
        )

    def _texts(self, row: TrialRow) -> Iterator[tuple[str, str]]:
        known = {name: getattr(row.summary, name) for name in _SUMMARY_TEXTS}
        own = {
            "stage": row.stage.value,
            "trial_id": row.trial_id,
            "config_id": row.config_id,
            "candidate_id": row.candidate_id,
            "seed": row.seed,  # as text: it has more digits than a float
            "octave": row.octave,
            "attempt": row.attempt,
        }
        for name, value in {**own, **known}.items():
            text = "" if value is None else str(value)
            if row.node:
                text = text.replace(row.node, "node")
            if text:
                yield name, self._text(text)

    def _parameter(self, one: Parameter) -> Parameter:
        choices = tuple(map(self._setting, one.choices))
        return replace(one, name=self._text(one.name), choices=choices)

    def _settings(self, given: Mapping[str, Json]) -> dict[str, Scalar]:
        return {self._text(name): self._setting(value) for name, value in given.items()}

    def _setting(self, value: Json) -> Scalar:
        if value is None or isinstance(value, bool | int | float):
            return value
        text = value if isinstance(value, str) else json.dumps(value)
        return self._text(text)

    def _text(self, text: str) -> str:
        return plain(self._privacy.text(text))[:_MAX_TEXT]


def curve(records: Sequence[StepRecord], started_s: float) -> tuple[StepScalars, ...]:
    """Return the steps of a trial: all, or evenly `MAX_POINTS` and every bad one.

    Args:
        records: In the order of the steps.
        started_s: When the trial began, seconds since 1970.
    """
    stride = max(1, -(-len(records) // MAX_POINTS))
    points, time_s = [], started_s
    for position, record in enumerate(records):
        time_s += record.step_s
        if position % stride == 0 or record.label is StepLabel.BAD or position == len(records) - 1:
            values = step_scalars(record)
            points.append(StepScalars(step=record.step, time_s=time_s, values=values))
    return tuple(points)


def _numbers(row: TrialRow, study: StudySettings, q: float | None) -> dict[str, float]:
    summary = row.summary
    horizon = study.confirm.steps if row.stage is Stage.CONFIRM else study.trial_steps
    probes = readings(summary, horizon)
    values: dict[str, Any] = {
        "q": q,
        "probe_first": probes[0] if probes else None,
        "probe_last": probe_levels(probes)[-1] if len(probes) > 0 else None,
        **{name: getattr(summary, name) for name in _SUMMARY_NUMBERS},
    }
    for name, value in summary.metrics_last.items():
        values[f"metric_{safe_name(name)}_last"] = value
    return {name: float(value) for name, value in values.items() if _is_number(value)}


def _margin(best: Mapping[str, Any]) -> str:
    octaves = best.get("margin_octaves")
    if not _is_number(octaves):
        return ""
    return f"at least {octaves:g}" if best.get("margin_is_capped") else f"{octaves:g}"


def _is_number(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _seconds(started_at: str) -> float:
    try:
        return datetime.fromisoformat(started_at).timestamp()
    except ValueError:
        return 0.0


def _written_scores(path: Path) -> Iterator[tuple[tuple[str, int], float]]:
    """Read the run scores of tables that an earlier end has left."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["trial_id", "attempt", "q"])
    except (OSError, pa.ArrowException, KeyError):
        return
    for row in table.to_pylist():
        if row["q"] is not None:
            yield (row["trial_id"], row["attempt"]), row["q"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
