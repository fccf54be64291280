"""The verdict for programs: one JSON object and the schema it keeps."""

import json
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from stability_search.inert import plain
from stability_search.report.advice import warnings
from stability_search.report.context import Report, Row, View
from stability_search.report.control import control_of
from stability_search.report.wording import OUTCOME_WORDS
from stability_search.scoring.constants import S_V1

SCHEMA = "stability-search/report/1"
_CONFIGURATION = (
    "score", "q_lower", "margin_octaves", "margin_is_capped", "num_seeds", "num_planned_steps",
    "num_bad_steps", "num_judged_steps", "bad_rate_bound", "ceiling", "calm", "smooth", "kept",
    "progress", "num_stable_seeds", "probe_last", "meets_bar",
)  # fmt: skip
_FILES = {
    "report": "report.html",
    "summary": "report.md",
    "trials": "trials.parquet",
    "configurations": "configurations.parquet",
    "space": "space.yaml",
    "ledger": "study.db",
}


def render_json(report: Report) -> dict[str, Any]:
    """Return the verdict as the object of `report.json`.

    Args:
        report: The study.

    Returns:
        Strict JSON values: no NaN, unknown is None. Within schema 1 keys are only added.
    """
    return document_of(View(report))


def document_of(view: View) -> dict[str, Any]:
    """Return the object of a study that has been looked at already."""
    report, verdict = view.report, view.verdict
    return {
        "schema": SCHEMA,
        "verdict": str(verdict.kind),
        "exit_code": verdict.exit_code,
        "choice_reason": None if verdict.choice_reason is None else str(verdict.choice_reason),
        "reason": plain(view.private(verdict.reason)),
        "best": _configuration(view, verdict.choice),
        "fastest": _configuration(view, verdict.fastest),
        "tied": _many(view, verdict.tied),
        "closest": _configuration(view, verdict.closest),
        "missed": [plain(view.private(text)) for text in verdict.missed],
        "confirmed": _many(view, verdict.confirmed),
        "unfinished": list(verdict.unfinished),
        "spared": list(verdict.spared),
        "outcomes": {outcome: view.outcomes[outcome] for outcome in map(str, OUTCOME_WORDS)},
        "control": _control(view),
        "warnings": list(warnings(view)),
        "study": _study(view),
        "environment": _private(view, dict(report.environment)),
        "files": {**_FILES, "best": "best.yaml" if verdict.choice else None},
    }


@cache
def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of `report.json`."""
    path = files("stability_search.report") / "assets" / "report.schema.json"
    schema: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return schema


def _configuration(view: View, config_id: str | None) -> dict[str, Any] | None:
    row: Row | None = view.by_id.get(config_id or "")
    if row is None:
        return None
    return {
        "config_id": row["config_id"],
        "settings": _private(view, view.settings(row["config_id"])),
        "score_version": S_V1.name,
        **{name: row[name] for name in _CONFIGURATION},
    }


def _control(view: View) -> dict[str, Any] | None:
    found = control_of(view)
    return None if found is None else asdict(found)


def _many(view: View, config_ids: tuple[str, ...]) -> list[dict[str, Any]]:
    found = [_configuration(view, config_id) for config_id in config_ids]
    return [configuration for configuration in found if configuration is not None]


def _study(view: View) -> dict[str, Any]:
    study, report = view.study, view.report
    return {
        "name": study.name,
        "task": view.private(report.task_name),
        "seed": study.seed,
        "device": report.device,
        "trial_steps": study.trial_steps,
        "confirm_steps": study.confirm.steps,
        "confirm_seeds": study.confirm.seeds,
        "confirm_octaves": study.confirm.octaves,
        "min_margin": study.confirm.min_margin,
        "num_trials": len(view.trials),
        # Of the run: another command may draw the report again.
        "command": view.private(str(report.environment.get("command") or report.command)),
        "run_directory": view.private(report.run_directory),
        "yardsticks": {
            str(horizon): {
                "e0": found.e0,
                "e0_source": found.e0_source,
                "e_star": found.e_star,
                "delta": found.delta,
                "sigma": found.sigma,
                "has_signal": found.has_signal,
            }
            for horizon, found in sorted(report.yardsticks.items())
        },
    }


def _private(view: View, value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return view.private(value)
    if isinstance(value, dict):
        return {str(name): _private(view, inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_private(view, inner) for inner in value]
    if isinstance(value, float) and value - value != 0:  # NaN or infinite
        return None
    return value
