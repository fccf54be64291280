"""The race's tables, as Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stability_search.records.values import Json
from tests.benchmarks.race.judging import Evaluated, GridPoint, survival_interval
from tests.benchmarks.race.ours import Finished

_HEADER = """\
| method | survived | 95 % | final probe loss | over the grid's best | trials | steps | train s |
|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One method on one study seed, judged.

    Attributes:
        name: As the table shows it.
        finished: What the method did.
        choice: What is judged; None where it chose nothing.
        evaluated: How that fared; None where there is nothing to judge.
    """

    name: str
    finished: Finished
    choice: Mapping[str, Json] | None
    evaluated: Evaluated | None


def shown(settings: Mapping[str, Json] | None, varying: Iterable[str]) -> str:
    """Write what varies of a configuration."""
    if settings is None:
        return "none"
    parts = []
    for name in varying:
        value = settings.get(name)
        text = f"{value:.3g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text.replace('None', 'null')}")
    return ", ".join(parts)


def track_table(
    lines: Sequence[Line], best: tuple[GridPoint, Evaluated] | None, varying: Sequence[str]
) -> str:
    """Write the tables of one track.

    Args:
        lines: Every method and study seed.
        best: Best of the grid that survived on all seeds of its evaluation; None if none did.
        varying: Names of the settings that vary.
    """
    names = dict.fromkeys(line.name for line in lines)
    rows = [_HEADER]
    rows += [_pooled(name, [line for line in lines if line.name == name], best) for name in names]
    if best is None:
        rows.append("| grid | nothing survived on all seeds | | | | | | |")
    else:
        rows.append(
            f"| grid: {shown(best[0].settings, varying)} | {_survival(best[1])} | "
            f"{best[1].mean:.4g} | | | | |"
        )
    rows += ["", "| method | seed | choice | survived | final probe loss | note |"]
    rows.append("|---|---|---|---|---|---|")
    rows += [_single(line, varying) for line in lines]
    parts = [_parts(line) for line in lines if line.name == "ours"]
    if parts:
        rows += ["", "| ours, seed | steps | share of confirm | by stage and kind |"]
        rows += ["|---|---|---|---|", *parts]
    return "\n".join(rows)


def _pooled(name: str, lines: Sequence[Line], best: tuple[GridPoint, Evaluated] | None) -> str:
    judged = [line.evaluated for line in lines if line.evaluated is not None]
    count = f" ({len(judged)} of {len(lines)} chose)" if len(judged) < len(lines) else ""
    survival, loss, over = "no choice | ", "", ""
    if judged:
        pooled = judged[0]
        for more in judged[1:]:
            pooled += more
        survival = _survival(pooled)
        loss = "-" if pooled.mean is None else f"{pooled.mean:.4g}"
        over = _over(pooled, best)
    trials = sum(line.finished.trials for line in lines)
    steps = sum(line.finished.steps for line in lines)
    train_s = sum(line.finished.train_s for line in lines)
    return (
        f"| {name}{count} | {survival} | {loss} | {over} | {trials} | {steps:,} | {train_s:.0f} |"
    )


def _survival(evaluated: Evaluated) -> str:
    low, high = survival_interval(evaluated.survived, evaluated.num_seeds)
    return f"{evaluated.survived}/{evaluated.num_seeds} | [{low:.2f}, {high:.2f}]"


def _over(evaluated: Evaluated, best: tuple[GridPoint, Evaluated] | None) -> str:
    if best is None or best[1].mean is None or evaluated.mean is None:
        return "-"
    return f"{100 * (evaluated.mean / best[1].mean - 1):+.1f} %"


def _single(line: Line, varying: Sequence[str]) -> str:
    judged = line.evaluated
    survival = "-" if judged is None else f"{judged.survived}/{judged.num_seeds}"
    loss = "-" if judged is None or judged.mean is None else f"{judged.mean:.4g}"
    note = line.finished.note.replace("|", "/")
    return (
        f"| {line.name} | {line.finished.seed} | {shown(line.choice, varying)} | {survival} | "
        f"{loss} | {note} |"
    )


def _parts(line: Line) -> str:
    finished = line.finished
    share = finished.parts.get("confirm", 0) / finished.steps
    parts = ", ".join(f"{name} {steps:,}" for name, steps in finished.parts.items())
    return f"| {finished.seed} | {finished.steps:,} | {share:.2f} | {parts} |"
