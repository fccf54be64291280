"""The verdict for a pull request: Markdown of at most 60 lines."""

from stability_search.inert import markdown, markdown_block, markdown_code
from stability_search.records.verdict import VerdictKind
from stability_search.report.advice import warnings, what_broke, what_to_widen
from stability_search.report.context import Report, Row, View
from stability_search.report.control import control_text
from stability_search.report.parts.verdict_card import compared, left_out_text, targets
from stability_search.report.snippets import as_yaml
from stability_search.report.wording import (
    bad_steps_text,
    choice_details,
    choice_text,
    count,
    headline,
    margin_text,
    next_step,
    number,
    outcomes_text,
    score_text,
    seeds_text,
)

MAX_LINES = 60
_MAX_WARNINGS = 8
_MAX_SETTINGS = 14
_MAX_ITEMS = 4


def render_markdown(report: Report) -> str:
    """Write the summary of a study.

    Args:
        report: The study.

    Returns:
        At most 60 lines; every string of the study is inert text in it.
    """
    return summary_of(View(report))


def summary_of(view: View) -> str:
    """Write the summary of a study that has been looked at already."""
    row = view.by_id.get(view.headline_id or "")
    lines = [f"## {markdown(view.study.name)}: {markdown(headline(view))}", ""]
    lines += [markdown(f"{choice_text(view)} {choice_details(view)}"), ""]
    if row is not None:
        lines += _chosen(view, row)
    if view.verdict.choice is None:
        lines += _why_not(view, row)
    lines += _confirmed(view)
    lines += _outcomes(view)
    lines += _warnings(view, MAX_LINES - len(lines) - 1)
    lines.append(f"Next: {markdown_code(next_step(view))}")
    return "\n".join(lines) + "\n"


def _chosen(view: View, row: Row) -> list[str]:
    about = "choice" if view.verdict.choice else "closest"
    lines = [f"**{about}** {markdown_code(row['config_id'])}: {_numbers(view, row)}", ""]
    met = {True: "met", False: "missed", None: "not measured"}
    found = targets(view, row["config_id"])
    if found:
        texts = [f"{markdown(t.name)} at most {t.limit}: {met[t.met]} ({t.value})" for t in found]
        lines += ["Targets: " + "; ".join(texts[:_MAX_ITEMS]) + ".", ""]
    body = as_yaml(view.settings(row["config_id"])).splitlines()
    if len(body) > _MAX_SETTINGS:
        left = len(body) - _MAX_SETTINGS
        body = [*body[:_MAX_SETTINGS], f"  # and {left} more: see best.yaml or trials.csv"]
    return [*lines, *markdown_block(body, "yaml"), ""]


def _numbers(view: View, row: Row) -> str:
    if row["score"] is None:
        return f"run score q {number(row['search_q'])} in one search trial; nothing was confirmed."
    return markdown(
        f"score {score_text(row['score'])} of at most {row['ceiling']:.1f}, stable on "
        f"{seeds_text(row)} over {row['num_planned_steps']:,} steps on {view.report.device}, "
        f"margin: {margin_text(row, view.study.confirm.octaves)}. {bad_steps_text(row)}."
    )


def _why_not(view: View, row: Row | None) -> list[str]:
    missed = list(view.verdict.missed)
    if not missed and row is not None and row["missed"]:
        missed = row["missed"].split("; ")
    lines = [f"- missed: {markdown(text)}" for text in missed[:_MAX_ITEMS]]
    lines += [f"- {markdown(text)}" for text in what_broke(view)]
    if view.verdict.kind is VerdictKind.NONE:
        lines.append(f"- {markdown(what_to_widen(view))}")
    return [*lines, ""] if lines else []


def _confirmed(view: View) -> list[str]:
    ids = [c for c in compared(view) if view.by_id[c]["score"] is not None]
    if not ids:
        return []
    lines = [
        "| configuration | learning rate | S | A | B | C | P | Q | margin | stable | last probe |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for config_id in ids:
        row = view.by_id[config_id]
        cells = [
            markdown_code(config_id),
            number(row.get("learning_rate")),
            markdown(f"{score_text(row['score'])} of {row['ceiling']:.1f}"),
            *(number(row[name] if row[name] is None else round(row[name], 2))
              for name in ("calm", "smooth", "kept", "progress", "q_lower")),
            margin_text(row, view.study.confirm.octaves),
            seeds_text(row),
            number(row["probe_last"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    left_out = left_out_text(view)
    return [*lines, "", *([f"{left_out}.", ""] if left_out else [])]


def _outcomes(view: View) -> list[str]:
    if not view.trials:
        return ["No trial ended.", ""]
    ended = outcomes_text(view, view.trials)
    lines = [markdown(f"Outcomes of {count(len(view.trials), 'trial')}: {ended}."), ""]
    control = control_text(view)
    return [*lines, markdown(control), ""] if control else lines


def _warnings(view: View, room: int) -> list[str]:
    """Return the warnings within a number of lines; those left out are counted."""
    found, around = warnings(view), 3  # heading and empty lines
    limit = min(_MAX_WARNINGS, room - around)
    if len(found) > limit:
        limit = min(limit, room - around - 1)
    lines = [f"- {markdown(text)}" for text in found[:limit]]
    if len(found) > limit:
        lines.append(f"- and {len(found) - limit} more in report.html")
    return ["Warnings:", "", *lines, ""] if lines else []
