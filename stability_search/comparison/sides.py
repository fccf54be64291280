"""What one run left behind, read for a comparison; nothing that it names is imported."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from stability_search import space as spaces
from stability_search.columns import COLUMNS
from stability_search.errors import SpaceError, UsageError
from stability_search.records.trial import Outcome, Stage
from stability_search.records.verdict import ChoiceReason, VerdictKind
from stability_search.report.document import SCHEMA
from stability_search.run_tables import Run, read_run
from stability_search.space import Space
from stability_search.table import records

Row = Mapping[str, Any]
_DECLARED = frozenset(c.name for c in COLUMNS if c.table == "configurations")
_MAX_BYTES = 64 * 1024**2  # no report of ours comes near it
_REPORT_HINT = "`stability-search report RUN` makes it from the ledger."


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """The yardstick of a run's confirm horizon, as its report holds it.

    Attributes:
        e0: E_0, the probe loss that counts as no progress; None if there was none.
        e0_source: What gave it: `start`, `baseline` or `blind`; empty without an E_0.
        e_star: E*, the lowest level of a sound run; None if there was none.
        delta: E_0 - E*; None without a signal.
        sigma: Standard error of that difference over the probe batches, >= 0.
    """

    e0: float | None
    e0_source: str
    e_star: float | None
    delta: float | None
    sigma: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Side:
    """One of two runs.

    Attributes:
        run: Its tables.
        space: Its space file, read again.
        verdict: How it ended.
        choice_reason: Why the choice is the choice; None without one.
        reason: Why there is no choice, or no verdict; empty otherwise.
        headline: The row of `configurations` that the verdict is about: the choice, else what
            came closest; None where there is neither.
        score_version: Name of the score of its configurations; None where none was scored.
        outcomes: Trials by how they ended.
        measure: The yardstick of its confirm horizon.
        task_sha256: Hash of the task's file as it was; empty for a built-in task or a module,
            None where it is not known.
        task_modules: Hash of each module beside that file that it imports, by its path from
            there; None where they are not known.
        versions: Versions of the packages it ran with; empty where they are not known.
        trials: Rows of `trials`.
    """

    run: Run
    space: Space
    verdict: VerdictKind
    choice_reason: ChoiceReason | None
    reason: str
    headline: Row | None
    score_version: str | None
    outcomes: Mapping[str, int]
    measure: Measure
    task_sha256: str | None
    task_modules: Mapping[str, str] | None
    versions: Mapping[str, str]
    trials: tuple[Row, ...]

    @property
    def horizon(self) -> int:
        """Steps of a confirm trial."""
        return self.space.study.confirm.steps

    @property
    def confirmed(self) -> dict[int, Row]:
        """Confirm trials of the headline that are results, by seed: of each the last attempt."""
        if self.headline is None:
            return {}
        rows = [
            row
            for row in self.trials
            if row["stage"] == Stage.CONFIRM
            and row["config_id"] == self.headline["config_id"]
            and row["q"] is not None
            and row["horizon"] == self.horizon
        ]
        return {row["seed"]: row for row in rows}  # attempts stand in their order

    def seen(self, column: str) -> frozenset[str]:
        """Return the texts of a column in the trials that are compared; else in all that trained.

        Args:
            column: A column of `trials`; null and empty cells are left out.
        """
        rows = self.confirmed.values() or [row for row in self.trials if row["num_steps"]]
        return frozenset(row[column] for row in rows if row[column])

    @property
    def settings(self) -> dict[str, Any]:
        """Every named setting of the headline; empty without one."""
        if self.headline is None:
            return {}
        return {name: value for name, value in self.headline.items() if name not in _DECLARED}


def read_side(path: Path) -> Side:
    """Read one of two runs from its tables, `report.json`, `space.yaml`, `environment.json`.

    Args:
        path: The run directory.

    Raises:
        UsageError: One of the first three is missing, damaged, or does not belong to the others.
    """
    if not path.is_dir():
        raise UsageError(
            f"{path}: no run directory.", hint="Give the directory that `run` printed."
        )
    report = path / "report.json"
    document = _document(report)
    run = read_run(path)
    space = _space(path / "space.yaml")
    headline, version = _headline(report, document, run)
    reason = _at(report, document, ("choice_reason",), str, type(None))
    kind = _at(report, document, ("verdict",), str)
    outcomes = _at(report, document, ("outcomes",), dict)
    try:
        return Side(
            run=run,
            space=space,
            verdict=VerdictKind(kind),
            choice_reason=None if reason is None else ChoiceReason(reason),
            reason=_at(report, document, ("reason",), str, type(None)) or "",
            headline=headline,
            score_version=version,
            outcomes={str(one): _count(outcomes.get(str(one), 0)) for one in Outcome},
            measure=_measure(report, document, space.study.confirm.steps),
            **_facts(path / "environment.json"),
            trials=tuple(records(run.trials)),
        )
    except ValueError as error:  # a word or a number that no version of ours writes
        _refuse(report, str(error))


def _document(path: Path) -> dict[str, Any]:
    try:
        found = _json(path)
    except FileNotFoundError:
        raise UsageError(
            f"A run with a report must be given, but {path} is missing.", hint=_REPORT_HINT
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        _refuse(path, str(error))
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        _refuse(path, f"its schema is not {SCHEMA}")
    return found


def _json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    with path.open("rb") as stream:
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it is larger than {_MAX_BYTES // 1024**2} MiB")
    return json.loads(data, parse_constant=_no_constant)


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise UsageError(
        f"{path} must be a report of ours, but could not be read: "
        f"{reason.partition(chr(10))[0].rstrip('.')}.",
        hint=_REPORT_HINT,
    ) from None


def _at(path: Path, document: Mapping[str, Any], keys: tuple[str, ...], *kinds: type) -> Any:  # noqa: ANN401 - of one of these types
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, kinds):
        _refuse(path, f"{'.'.join(keys)} is missing or of another type")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"a number of trials must be an integer >= 0, but got {value!r}")
    return value


def _headline(path: Path, document: dict[str, Any], run: Run) -> tuple[Row | None, str | None]:
    """Return the row the verdict is about, and the version of its score."""
    rows = {row["config_id"]: row for row in records(run.configurations)}
    for key in ("best", "closest"):
        found = _at(path, document, (key,), dict, type(None))
        if found is None:
            continue
        config_id = _at(path, document, (key, "config_id"), str)
        if config_id not in rows:
            raise UsageError(
                f"{path} and the tables beside it must be of one run, but configuration "
                f"{config_id} is not among them.",
                hint="`stability-search report RUN` makes all of them again from the ledger.",
            )
        row = rows[config_id]
        version = None if row["score"] is None else found.get("score_version")
        return row, None if version is None else str(version)
    return None, None


def _measure(path: Path, document: dict[str, Any], horizon: int) -> Measure:
    place = ("study", "yardsticks", str(horizon))
    found = _at(path, document, place, dict, type(None)) or {}
    has_signal = found.get("has_signal") is True
    delta = _finite(found.get("delta"))
    return Measure(
        e0=_finite(found.get("e0")),
        e0_source=str(found.get("e0_source") or ""),
        e_star=_finite(found.get("e_star")),
        delta=delta if has_signal and delta is not None and delta > 0 else None,
        sigma=_finite(found.get("sigma")) or 0.0,
    )


def _finite(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _space(path: Path) -> Space:
    if not path.is_file():
        raise UsageError(f"A run directory must hold {path.name}, but {path.parent} does not.")
    try:
        return spaces.load(path)
    except SpaceError as error:
        first = error.problems[0]
        where = f"{first.key}: " if first.key else ""
        raise UsageError(
            f"{path} must be the space of a run, but could not be read: {where}{first.message}"
        ) from None


def _facts(path: Path) -> dict[str, Any]:
    """Return what is known of the task's code and the packages; nothing is no error."""
    try:
        study = _json(path)["study"]
        sha256, versions = study["task_sha256"], _texts(study["versions"])
        modules = study.get("task_modules")  # earlier versions kept none
        known = None if modules is None else _texts(modules)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {"task_sha256": None, "task_modules": None, "versions": {}}
    return {
        "task_sha256": sha256 if isinstance(sha256, str) else None,
        "task_modules": known,
        "versions": versions,
    }


def _texts(found: Mapping[Any, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in found.items()}
