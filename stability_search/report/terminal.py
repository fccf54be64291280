"""The verdict as plain lines for a terminal."""

from stability_search.inert import plain
from stability_search.records.verdict import VerdictKind
from stability_search.report.advice import warnings, what_broke, what_to_widen
from stability_search.report.context import Report, Row, View
from stability_search.report.control import control_text
from stability_search.report.parts.verdict_card import compared, left_out_text, targets
from stability_search.report.wording import (
    bad_steps_text,
    choice_details,
    choice_text,
    headline,
    margin_text,
    outcomes_text,
    score_text,
    seeds_text,
    setting_value,
)


def verdict_lines(report: Report) -> list[str]:
    """Return the verdict, a line each.

    Args:
        report: The study.

    Returns:
        Plain text without markup or control characters.
    """
    view = View(report)
    lines = [f"{headline(view)}. {choice_text(view)} {choice_details(view)}".rstrip()]
    row = view.by_id.get(view.headline_id or "")
    if row is not None:
        about = "choice" if view.verdict.choice else "closest"
        lines.append(f"{about} {row['config_id']}: {settings_text(view, row)}")
        lines += _numbers(view, row)
    missed = view.verdict.missed or tuple((row or {}).get("missed", "").split("; "))
    if view.verdict.kind is VerdictKind.NONE:
        lines += [f"it missed: {plain(text)}" for text in missed if text]
    lines += [*what_broke(view), f"outcomes: {outcomes_text(view, view.trials)}"]
    if view.verdict.kind is VerdictKind.NONE:
        lines.append(what_to_widen(view))
    others = [view.by_id[c] for c in compared(view) if c != view.headline_id]
    lines += [f"also {_role(view, other)} {_one_line(view, other)}" for other in others]
    lines += [text for text in (left_out_text(view), control_text(view)) if text]
    lines += [f"warning: {text}" for text in warnings(view)]
    return lines


def settings_text(view: View, row: Row) -> str:
    """Return the settings that vary, or all where none does, on one line."""
    names = view.report.varying or view.report.setting_names
    return ", ".join(f"{plain(name)} {setting_value(row.get(name))}" for name in names)


def _numbers(view: View, row: Row) -> list[str]:
    if row["score"] is None:
        q = "unknown" if row["search_q"] is None else f"{row['search_q']:.2f}"
        return [f"run score q {q} in one search trial; nothing was confirmed"]
    lines = [
        _score(row),
        f"on {plain(view.report.device)}: {_stability(view, row)}",
        bad_steps_text(row),
    ]
    for target in targets(view, row["config_id"]):
        word = {True: "met", False: "missed", None: "not measured"}[target.met]
        lines.append(f"target {target.name} <= {target.limit}: {word} ({target.value})")
    return lines


def _role(view: View, row: Row) -> str:
    verdict, config_id = view.verdict, row["config_id"]
    if config_id == verdict.fastest:
        return "the fastest that meets the bar:"
    if config_id in view.report.start_config_ids:
        return "today's:"
    return "tied:" if config_id in verdict.tied else "confirmed:"


def _one_line(view: View, row: Row) -> str:
    if row["score"] is None:
        return f"{row['config_id']}, not confirmed"
    return f"{row['config_id']}: {_score(row)}, {_stability(view, row)}"


def _score(row: Row) -> str:
    """Return the score with its ceiling and its factors: it never stands without them."""
    names = (("A", "calm"), ("B", "smooth"), ("C", "kept"), ("P", "progress"),
             ("Q", "q_lower"), ("M", "mean_margin"))  # fmt: skip
    factors = [f"{letter} {row[name]:.2f}" for letter, name in names if row[name] is not None]
    score = f"score {score_text(row['score'])} of at most {row['ceiling']:.1f}"
    return f"{score} ({', '.join(factors)})"


def _stability(view: View, row: Row) -> str:
    margin = margin_text(row, view.study.confirm.octaves)
    return f"{seeds_text(row)} stable over {row['num_planned_steps']:,} steps, margin: {margin}"
