"""`diagnosis.json` and `diagnosis.md`, and the table that the terminal shows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from stability_search.diagnose.batch_statistics import FieldStatistics
from stability_search.diagnose.conclusion import Verdict, data_summary
from stability_search.diagnose.ends import TrialEnd
from stability_search.diagnose.ladder import Ladder, RungResult
from stability_search.diagnose.verdict import Cause
from stability_search.inert import markdown, markdown_block
from stability_search.records.values import Json

SCHEMA = "stability-search/diagnosis/1"
MAX_FIELDS = 12  # of a batch that the terminal shows; diagnosis.md has all


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What was diagnosed, how, and what came of it.

    Attributes:
        name: Name of the study.
        task: The task as the space file names it.
        device: `cpu` or `cuda`.
        created: When it began: UTC, ISO 8601.
        settings: The configuration as given.
        configuration: The same in one line, with where it was taken from.
        task_args: The rest of the task's arguments.
        verdict: The cause and what to do.
        command: How to diagnose again with the remedy; empty where there is none.
        ladder: What was run; None where it never began.
        wall_s: Seconds it took.
    """

    name: str
    task: str
    device: str
    created: str
    settings: Mapping[str, Json]
    configuration: str = ""
    task_args: Mapping[str, Json] = field(default_factory=dict)
    verdict: Verdict
    command: str = ""
    ladder: Ladder | None = None
    wall_s: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 where a cause is named or nothing is wrong, 3 where it fails for no cause found."""
        return 3 if self.verdict.cause is Cause.NOT_FOUND else 0


def as_json(diagnosis: Diagnosis) -> str:
    """Return strict JSON: no NaN, no Infinity."""
    ladder = diagnosis.ladder
    document = {
        "schema": SCHEMA,
        "name": diagnosis.name,
        "task": diagnosis.task,
        "device": diagnosis.device,
        "created": diagnosis.created,
        "settings": dict(diagnosis.settings),
        "configuration": diagnosis.configuration,
        "task_args": dict(diagnosis.task_args),
        "verdict": asdict(diagnosis.verdict),
        "command": diagnosis.command,
        "num_planned_steps": ladder.config.num_planned_steps if ladder else None,
        "seeds": list(ladder.seeds) if ladder else [],
        "data": asdict(ladder.data) if ladder else None,
        "ladder": [_rung_json(result) for result in ladder.results.values()] if ladder else [],
        "wall_s": round(diagnosis.wall_s, 2),
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _rung_json(result: RungResult) -> dict[str, object]:
    return {
        "rung": result.rung.name.value,
        "title": result.rung.title,
        "changes": result.changes,
        "left_out": result.left_out,
        "trials": [asdict(end) for end in result.ends],
    }


def terminal_lines(diagnosis: Diagnosis) -> list[str]:
    """Return the ladder as a table and the verdict below it."""
    lines: list[str] = []
    if diagnosis.ladder is not None:
        data = diagnosis.ladder.data
        lines += [f"data: {line}" for line in data_summary(data)]
        lines += ["", *_aligned(field_rows(data.training[:MAX_FIELDS]))] if data.training else []
        lines += ["", *_aligned(ladder_rows(diagnosis.ladder))]
        lines += [*_left_out_lines(diagnosis.ladder), ""]
    return [*lines, *verdict_lines(diagnosis)]


def verdict_lines(diagnosis: Diagnosis) -> list[str]:
    """Return the verdict, a line per thing to know."""
    verdict = diagnosis.verdict
    lines = [f"verdict: {verdict.cause.value}", verdict.headline]
    lines += [line for line in (verdict.sureness, verdict.first_seen) if line]
    if verdict.changes:
        words = ", ".join(
            f"{name}: {yaml_value(value)}" for name, value in verdict.changes.items()
        )
        lines.append(f"change: {words}  ({verdict.remedy})")
    if verdict.also_helped:
        lines.append(f"would also have helped: {'; '.join(verdict.also_helped)}")
    lines += list(verdict.notes)
    if diagnosis.command:
        lines.append(f"next: {diagnosis.command}")
    return lines


def ladder_rows(ladder: Ladder) -> list[list[str]]:
    """Return the table of the ladder: a row per rung that ran, a column per seed."""
    ran = [result for result in ladder.results.values() if result.ends]
    used = [seed for seed in ladder.seeds if any(_end(result, seed) for result in ran)]
    rows = [["rung", *(f"seed {ladder.number(seed)}" for seed in used), "what was seen"]]
    for result in ran:
        cells = [cell(_end(result, seed), ladder) for seed in used]
        rows.append([result.rung.title, *cells, _seen(result.ends)])
    return rows


def cell(end: TrialEnd | None, ladder: Ladder) -> str:
    """Say in three words how a trial ended; a dash where it was not needed."""
    if end is None:
        return "-"
    if end.error:
        return "error"
    if end.has_failed:
        return f"fails at {end.failed_at}"
    if end.has_timed_out:
        return f"time at {end.num_steps}"
    return "not learned yet" if ladder.is_stuck(end) else f"holds {end.num_steps}"


def _end(result: RungResult, seed: int) -> TrialEnd | None:
    return next((end for end in result.ends if end.seed == seed), None)


def _seen(ends: Sequence[TrialEnd]) -> str:
    broken = next((end for end in ends if end.has_failed), None)
    if broken is not None:
        return f"{broken.failure}{f', first in {broken.module}' if broken.module else ''}"
    error = next((end.error for end in ends if end.error), "")
    levels = [end.last_level for end in ends if end.last_level is not None]
    if error or not levels:
        return error
    text = f"probe {levels[0]:.3g}"
    return f"{text}, untrained {ends[0].first_probe:.3g}" if ends[0].first_probe else text


def _left_out_lines(ladder: Ladder) -> list[str]:
    return [f"left out: {title}: {reason}" for title, reason in left_out(ladder)]


def left_out(ladder: Ladder) -> list[tuple[str, str]]:
    """Return every rung that does not apply, with the reason."""
    return [
        (result.rung.title, result.left_out)
        for result in ladder.results.values()
        if result.left_out
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def as_markdown(diagnosis: Diagnosis) -> str:
    """Return the diagnosis as a page; every string of the task is inert text in it."""
    _, *rest = verdict_lines(diagnosis)
    title = f"Diagnosis of {diagnosis.name}: {diagnosis.verdict.cause.value}"
    lines = [f"# {markdown(title)}", ""]
    lines += [f"- {markdown(line)}" for line in rest if not line.startswith("next: ")]
    lines += [f"- {markdown(diagnosis.configuration)}"] if diagnosis.configuration else []
    if diagnosis.command:
        lines += ["", *markdown_block([diagnosis.command])]
    ladder = diagnosis.ladder
    if ladder is not None:
        steps = ladder.config.num_planned_steps
        lines += ["", "## The ladder", "", f"Trials of {steps} steps on {diagnosis.device}.", ""]
        lines += _markdown_table(ladder_rows(ladder))
        skipped = left_out(ladder)
        lines += ["", "Left out:", ""] if skipped else []
        lines += [f"- {markdown(title)}: {markdown(reason)}" for title, reason in skipped]
        lines += ["", "## The data", ""]
        lines += [f"- {markdown(line)}" for line in data_summary(ladder.data)]
        for source, rows in (("Training", ladder.data.training), ("Probe", ladder.data.probe)):
            lines += ["", f"{source}:", "", *_markdown_table(field_rows(rows))]
    lines += ["", f"Created {diagnosis.created}, in {diagnosis.wall_s:.0f} s.", ""]
    return "\n".join(lines)


def field_rows(fields: Iterable[FieldStatistics]) -> list[list[str]]:
    """Return the statistics as a table; integers have no mean worth reading."""
    rows = [["field", "type", "shape", "min", "max", "mean", "std", "NaN", "Inf"]]
    for one in fields:
        shape = " x ".join(map(str, one.shape)) or "scalar"
        mean_and_std = [_short(one.mean), _short(one.std)] if one.is_float else ["", ""]
        rows.append(
            [
                one.name or "(batch)",
                one.dtype,
                f"{shape}{', ragged' if one.is_ragged else ''}",
                _short(one.low),
                _short(one.high),
                *mean_and_std,
                str(one.num_nan),
                str(one.num_inf),
            ]
        )
    return rows


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ([markdown(text) for text in row] for row in rows)
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(row)} |" for row in body),
    ]


def yaml_value(value: Json) -> str:
    """Return a value as YAML reads it back."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)
