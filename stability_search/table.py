"""Rows of the ledger become tables whose every column is declared in `columns.py`.

`trials` has a row per trial, `configurations` a row per `config_id`. Both hold finite numbers,
text and nulls only, in nullable types, so that `groupby(..., dropna=False)` keeps a setting that
is off. The same rows give the same bytes.
"""

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stability_search.columns import COLUMNS, RESERVED_NAMES, Column, Dtype, TableName
from stability_search.errors import UsageError
from stability_search.files import write_whole
from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json
from stability_search.records.verdict import Verdict
from stability_search.scoring.constants import S_V1
from stability_search.scoring.run import RunScore, probe_levels
from stability_search.settings.engine import EngineSettings
from stability_search.settings.study import StudySettings
from stability_search.spreadsheet import csv_text
from stability_search.standing import (
    ConfigurationStanding,
    configuration_standings,
    score_trial,
)
from stability_search.yardstick import Yardstick, readings, refused, yardstick

STABLE_Q = S_V1.alive_q
"""A completed trial counts as stable from this run score on."""

ARROW_TYPES: Mapping[Dtype, pa.DataType] = {
    "string": pa.string(),
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "boolean": pa.bool_(),
}
"""How a declared type is stored."""

PANDAS_TYPES: Mapping[pa.DataType, Any] = {
    pa.string(): pd.StringDtype("pyarrow"),
    pa.int64(): pd.Int64Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""How a stored type is read: every one of them has a null."""

STORED_TABLES: tuple[TableName, ...] = ("trials", "configurations")
"""The tables that are files of a run directory; `steps` is a folder of them."""

_INT64_LIMIT = 2**63
_TRIAL_FACTS = tuple(column.name for column in COLUMNS if column.table == "trials")
_STAGES = tuple(Stage)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tables:
    """The two tables of a study that its driver writes; the third is its step files.

    Attributes:
        trials: A row per trial, by stage, index and attempt.
        configurations: A row per configuration: the confirmed ones best first, then the others.
    """

    trials: pd.DataFrame
    configurations: pd.DataFrame


def study_yardsticks(rows: Sequence[TrialRow], study: StudySettings) -> dict[int, Yardstick]:
    """Refit the yardstick of every horizon of a study.

    Args:
        rows: Every finished trial.
        study: The study's blocks; gives the two horizons.

    Returns:
        A yardstick each for `trial.steps` and `confirm.steps`, by horizon; one without signal
        makes every score 0.
    """
    horizons = sorted({study.trial_steps, study.confirm.steps})
    fitted = {horizon: yardstick(rows, horizon) for horizon in horizons}
    return {h: one if one.has_signal else refused(one) for h, one in fitted.items()}


def check_setting_names(names: Iterable[str]) -> None:
    """Refuse settings that are named like a column of the tables.

    Raises:
        UsageError: Names them.
    """
    taken = sorted(RESERVED_NAMES.intersection(names))
    if taken:
        raise UsageError(
            "A setting must not be named like a column of the tables, "
            f"but got {', '.join(taken)}.",
            hint="Rename that parameter of the task's constructor.",
        )


def build_tables(
    rows: Sequence[TrialRow],
    *,
    space_settings: Sequence[str],
    study: StudySettings,
    yardsticks: Mapping[int, Yardstick],
    verdict: Verdict,
) -> Tables:
    """Turn finished trials into the two tables.

    Args:
        rows: Every finished trial, in any order.
        space_settings: Names of all settings of the space, in the order of their columns.
        study: The study's blocks.
        yardsticks: What `study_yardsticks` returned for these rows.
        verdict: How the study ended; gives each configuration its role.

    Returns:
        Tables that depend on the set of rows only, not on their order.

    Raises:
        UsageError: A setting is named like a column.
    """
    check_setting_names(space_settings)
    ordered = sorted(rows, key=_row_order)
    types = {name: _setting_type(name, ordered) for name in space_settings}
    scores = {_row_key(row): _scored(row, study, yardsticks) for row in ordered}
    metrics = sorted({name for row in ordered for name in row.summary.metrics_first}
                     | {name for row in ordered for name in row.summary.metrics_last})  # fmt: skip
    trial_rows = [
        {
            **_trial_values(row, scores[_row_key(row)], study, yardsticks),
            **_setting_values(row.settings, types),
            **_metric_values(row, metrics),
        }
        for row in ordered
    ]
    extra: dict[str, Dtype] = dict(types)
    for name in metrics:
        extra |= {
            _metric_column(name, "first"): "Float64",
            _metric_column(name, "last"): "Float64",
        }
    return Tables(
        trials=_frame("trials", trial_rows, extra),
        configurations=_configurations(
            ordered,
            types=types,
            scores=scores,
            study=study,
            yardsticks=yardsticks,
            verdict=verdict,
        ),
    )


def write_tables(tables: Tables, folder: Path) -> tuple[Path, ...]:
    """Write `trials` and `configurations` as Parquet and CSV, each whole or not at all.

    Args:
        tables: What to write.
        folder: The run directory; exists.

    Returns:
        The four files.

    Raises:
        StoppedEarlyError: The disk is full or the folder cannot be written.
    """
    written = []
    for name in STORED_TABLES:
        frame: pd.DataFrame = getattr(tables, name)
        sink = io.BytesIO()
        pq.write_table(_to_arrow(name, frame), sink, compression="zstd")
        write_whole(folder / f"{name}.parquet", sink.getvalue())
        write_whole(folder / f"{name}.csv", to_csv(frame))
        written += [folder / f"{name}.parquet", folder / f"{name}.csv"]
    return tuple(written)


def to_csv(frame: pd.DataFrame) -> str:
    """Write a table as CSV text that a spreadsheet does not execute.

    Text that starts like a formula gets an apostrophe in front; null is the empty cell.
    """
    return csv_text([str(n) for n in frame.columns], (r.values() for r in records(frame)))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dicts of plain Python values, None for null."""
    columns = {
        str(name): [None if value is pd.NA else value for value in frame[name].tolist()]
        for name in frame.columns
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _row_order(row: TrialRow) -> tuple[int, int, int, str]:
    return (_STAGES.index(row.stage), row.index, row.attempt, row.trial_id)


def _row_key(row: TrialRow) -> tuple[str, int]:
    return (row.trial_id, row.attempt)


def _horizon(row: TrialRow, study: StudySettings) -> int:
    return study.confirm.steps if row.stage is Stage.CONFIRM else study.trial_steps


def _scored(
    row: TrialRow, study: StudySettings, yardsticks: Mapping[int, Yardstick]
) -> RunScore | None:
    return score_trial(row, yardsticks[_horizon(row, study)])


def _trial_values(
    row: TrialRow,
    score: RunScore | None,
    study: StudySettings,
    yardsticks: Mapping[int, Yardstick],
) -> dict[str, Any]:
    """Return one value for every declared column of `trials`."""
    summary, horizon = row.summary, yardsticks[_horizon(row, study)].horizon
    probes = readings(summary, horizon)
    computed = {
        "is_stable": None
        if score is None
        else summary.outcome is Outcome.COMPLETED and score.q >= STABLE_Q,
        "horizon": horizon,
        "q": None if score is None else score.q,
        "probe_first": probes[0] if probes else None,
        "probe_last": probe_levels(probes)[-1] if len(probes) > 0 else None,
        "warnings": " ".join(summary.warnings),
        "alarms": ", ".join(f"{name} {count}" for name, count in summary.alarms.items()),
    }
    factors = ("calm", "smooth", "kept", "progress", "num_spikes")
    computed |= {name: None if score is None else getattr(score, name) for name in factors}
    computed |= _control_values(row, study, yardsticks)
    computed["stopped_before_refit"] = _stopped_before_refit(row, yardsticks[horizon])

    def value(name: str) -> Any:  # noqa: ANN401 - a column's value is of its column's type
        if name in computed:
            return computed[name]
        return getattr(row if hasattr(row, name) else summary, name)

    return {name: value(name) for name in _TRIAL_FACTS}


def _stopped_before_refit(row: TrialRow, measure: Yardstick) -> bool | None:
    if row.summary.outcome is not Outcome.DIVERGED:
        return None
    return measure.delta is not None and row.delta != measure.delta


def _control_values(
    row: TrialRow, study: StudySettings, yardsticks: Mapping[int, Yardstick]
) -> dict[str, Any]:
    """Say what became of a killed trial that was let run on; nulls for every other."""
    control = row.summary.control
    names = ("control_outcome", "control_q", "control_num_steps")
    if control is None:
        return dict.fromkeys(names)
    whole = replace(row, summary=row.summary.without_the_kill())
    score = _scored(whole, study, yardsticks)
    q = None if score is None else score.q
    return dict(zip(names, (control.outcome, q, control.num_steps), strict=True))


def _metric_column(name: str, when: str) -> str:
    return f"metric_{_text(name)}_{when}"


def _metric_values(row: TrialRow, metrics: Sequence[str]) -> dict[str, float | None]:
    values = {}
    for name in metrics:
        values[_metric_column(name, "first")] = row.summary.metrics_first.get(name)
        values[_metric_column(name, "last")] = row.summary.metrics_last.get(name)
    return values


def _setting_values(settings: Mapping[str, Json], types: Mapping[str, Dtype]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, dtype in types.items():
        value = settings.get(name)
        is_plain = value is None or isinstance(value, str) or dtype != "string"
        values[name] = value if is_plain else json.dumps(value)
    return values


def _setting_type(name: str, rows: Sequence[TrialRow]) -> Dtype:
    """Type a setting's column by its values, or, where they are no help, by the engine's."""
    values = [row.settings.get(name) for row in rows]
    kinds = {type(value) for value in values if value is not None}
    declared = _ENGINE_TYPES.get(name)
    if not kinds:
        return declared or "string"
    if kinds == {bool}:
        return "boolean"
    if kinds == {int} and all(abs(v) < _INT64_LIMIT for v in values if isinstance(v, int)):
        return "Int64"
    return "Float64" if kinds <= {int, float} else "string"


def _engine_types() -> dict[str, Dtype]:
    types: dict[str, Dtype] = {}
    for name, hint in get_type_hints(EngineSettings).items():
        kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
        by_kind: dict[Any, Dtype] = {float: "Float64", int: "Int64", bool: "boolean"}
        types[name] = by_kind.get(kinds[0], "string")
    return types


_ENGINE_TYPES: Mapping[str, Dtype] = _engine_types()


def _configurations(  # noqa: PLR0913 - the facts of build_tables, already worked out
    rows: Sequence[TrialRow],
    *,
    types: Mapping[str, Dtype],
    scores: Mapping[tuple[str, int], RunScore | None],
    study: StudySettings,
    yardsticks: Mapping[int, Yardstick],
    verdict: Verdict,
) -> pd.DataFrame:
    confirm = yardsticks[study.confirm.steps]
    standings = {
        s.config_id: s for s in configuration_standings(rows, study=study, yardstick=confirm)
    }
    settings: dict[str, Mapping[str, Json]] = {}
    stages: dict[str, set[Stage]] = {}
    search_q: dict[str, float] = {}
    for row in rows:
        settings.setdefault(row.config_id, row.settings)
        stages.setdefault(row.config_id, set()).add(row.stage)
        score = scores[_row_key(row)]
        if row.stage is Stage.SEARCH and score is not None:
            search_q.setdefault(row.config_id, score.q)
    values = [
        {
            "config_id": config_id,
            "role": _role(config_id, verdict, stages[config_id]),
            "is_fastest": config_id == verdict.fastest,
            **_standing_values(standings.get(config_id)),
            "search_q": search_q.get(config_id),
            **_setting_values(settings[config_id], types),
        }
        for config_id in settings
    ]
    place = {config_id: rank for rank, config_id in enumerate(verdict.confirmed)}
    values.sort(
        key=lambda v: (
            place.get(v["config_id"], len(place)),
            -_or_low(v.get("score")),
            -_or_low(v.get("search_q")),
            v["config_id"],
        )
    )
    return _frame("configurations", values, types)


def _or_low(value: float | None) -> float:
    return -1.0 if value is None else value


def _role(config_id: str, verdict: Verdict, stages: set[Stage]) -> str:
    roles = (
        ("choice", config_id == verdict.choice),
        ("tied", config_id in verdict.tied),
        ("closest", config_id == verdict.closest),
        ("confirmed", config_id in verdict.confirmed),
        ("rung", Stage.CONFIRM in stages),
        ("search", Stage.SEARCH in stages),
    )
    return next((role for role, applies in roles if applies), "pilot")


def _standing_values(standing: ConfigurationStanding | None) -> dict[str, Any]:
    if standing is None:
        return {}
    own = (
        *("calm", "smooth", "kept", "progress", "num_completed", "num_planned_steps"),
        *("num_judged_steps", "num_bad_steps", "bad_rate_bound", "probe_last", "meets_bar"),
    )
    of_score = (
        *("score", "q_lower", "mean_margin", "margin_octaves", "margin_is_capped"),
        *("num_seeds", "ceiling"),
    )
    return {
        **{name: getattr(standing, name) for name in own},
        **{name: getattr(standing.score, name) for name in of_score},
        "num_stable_seeds": sum(q >= STABLE_Q for q in standing.q),
        "missed": "; ".join(standing.missed),
    }


def _frame(
    table: TableName, rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Dtype]
) -> pd.DataFrame:
    """Make a table of the declared columns and, after them, the study's own."""
    types = {c.name: c.dtype for c in COLUMNS if c.table == table} | dict(extra)
    arrays = {
        name: pd.array(
            [_cell(row.get(name), dtype) for row in rows], dtype=PANDAS_TYPES[ARROW_TYPES[dtype]]
        )
        for name, dtype in types.items()
    }
    return pd.DataFrame(arrays)


def _cell(value: Any, dtype: Dtype) -> Any:  # noqa: ANN401 - JSON in, a cell out
    """Return a value the column can hold: finite, in range, valid text; else None."""
    if value is None:
        return None
    if dtype == "string":
        return _text(str(value))
    if dtype == "boolean":
        return bool(value)
    if isinstance(value, complex) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) >= _INT64_LIMIT:
        value = _huge(value)
    if value is None or not math.isfinite(value):
        return None
    return int(value) if dtype == "Int64" else float(value)


def _huge(value: int) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def _text(value: str) -> str:
    """Return text that UTF-8 can hold: lone surrogates are written out."""
    return value.encode("utf-8", "backslashreplace").decode()


def _to_arrow(table: TableName, frame: pd.DataFrame) -> pa.Table:
    declared = {column.name: column for column in COLUMNS if column.table == table}
    fields, arrays = [], []
    for name in frame.columns:
        arrow = pa.array(frame[name].array)
        arrow = arrow.cast(_arrow_type(frame[name].dtype))
        fields.append(pa.field(str(name), arrow.type, metadata=_metadata(declared.get(str(name)))))
        arrays.append(arrow)
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def _arrow_type(dtype: Any) -> pa.DataType:  # noqa: ANN401 - pandas has no common dtype type
    return next(arrow for arrow, pandas in PANDAS_TYPES.items() if pandas == dtype)


def _metadata(column: Column | None) -> dict[str, str] | None:
    return None if column is None else {"unit": column.unit, "meaning": column.meaning}
