"""Part 0, the verdict card: what do I train with, and can I trust it?"""

from dataclasses import dataclass

from stability_search.inert import plain
from stability_search.records.verdict import VerdictKind
from stability_search.report import snippets
from stability_search.report.advice import warnings, what_broke, what_to_widen
from stability_search.report.context import Row, Rung, RungState, View
from stability_search.report.grouping import applying
from stability_search.report.parts.ladders import role_words
from stability_search.report.wording import (
    MIN_SEEDS_FOR_WINNER,
    bad_steps_text,
    choice_details,
    choice_text,
    count,
    headline,
    margin_text,
    next_hint,
    next_step,
    number,
    outcomes_text,
    score_text,
    seeds_text,
    setting_value,
)

_MAX_COMPARED = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One number of the card.

    Attributes:
        label: What it is.
        value: The number.
        note: What it means, or its limit.
    """

    label: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """One factor of the score, drawn as a bar.

    Attributes:
        letter: A, B, C, P, Q or M.
        label: Its name.
        value: In [0, 1].
        text: The number.
    """

    letter: str
    label: str
    value: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One rung of the choice's ladder, as a chip.

    Attributes:
        times: `base`, `x2`, ...
        rate: Learning rate.
        state: `held`, `broke`, `lost` or `untried`.
        note: What happened there.
    """

    times: str
    rate: str
    state: str
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The choice beside the others: a column per configuration.

    Attributes:
        headings: Role and id of each column.
        rows: Name and cells of each row; differing settings first.
        left_out: How many others have no column; empty if none.
    """

    headings: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    left_out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A limit the space file asks for.

    Attributes:
        name: The metric.
        limit: Its upper limit.
        value: What was measured, the worst seed.
        met: True if every seed kept it; None if it was not measured.
    """

    name: str
    limit: str
    value: str
    met: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Everything the verdict card says."""

    kind: str
    headline: str
    lead: str
    details: str
    about: str
    config_id: str
    settings: tuple[tuple[str, str], ...]
    facts: tuple[Fact, ...]
    factors: tuple[Factor, ...]
    ladder: tuple[Step, ...]
    snippets: tuple[tuple[str, str], ...]
    comparison: Comparison | None
    trade: str
    targets: tuple[Target, ...]
    missed: tuple[str, ...]
    broke_title: str
    broke: tuple[str, ...]
    today: str
    widen: str
    warnings: tuple[str, ...]
    next_command: str
    next_hint: str


def build(view: View) -> Card:
    """Work out what the card says."""
    config_id = view.headline_id
    row = view.by_id.get(config_id or "")
    is_none = view.verdict.kind is VerdictKind.NONE
    missed = tuple(view.verdict.missed)
    if is_none and not missed and row is not None and row["missed"]:
        missed = tuple(row["missed"].split("; "))
    what = what_broke(view)
    others = "others" if row is not None else "trials"
    return Card(
        kind=str(view.verdict.kind),
        headline=headline(view),
        lead=_lead(view),
        details=choice_details(view),
        about="The choice" if view.verdict.choice else "What came closest",
        config_id=config_id or "",
        settings=() if row is None else _active(view, row),
        facts=() if row is None else facts(view, row),
        factors=() if row is None else _factors(row),
        ladder=() if row is None else _ladder(view, row["config_id"]),
        snippets=() if row is None else _snippets(view, row["config_id"]),
        comparison=_comparison(view),
        trade=_trade(view),
        targets=() if row is None else targets(view, row["config_id"]),
        missed=tuple(plain(view.private(text)) for text in missed),
        broke_title=f"What broke the {others}" if what else "How the trials ended",
        broke=(*what, _all_outcomes(view)),
        today=today_text(view),
        widen=what_to_widen(view) if is_none else "",
        warnings=warnings(view),
        next_command=next_step(view),
        next_hint=next_hint(view),
    )


def _lead(view: View) -> str:
    text = choice_text(view)
    return f"Train with the settings below. {text}" if view.verdict.choice else text


def today_text(view: View) -> str:
    """Say how today's configuration did; empty where the space names none."""
    today = next(iter(view.report.start_config_ids), None)
    row = view.by_id.get(today or "")
    if row is None or today == view.headline_id:
        return ""
    if not row["num_seeds"]:
        return f"{row['config_id']} was not confirmed."
    ends = outcomes_text(view, view.seeds_of(row["config_id"]))
    return (
        f"{row['config_id']}: {seeds_text(row)} stable over "
        f"{count(row['num_planned_steps'], 'step')} ({ends}); "
        f"{row['num_bad_steps']:,} of {count(row['num_judged_steps'], 'step')} bad."
    )


def _active(view: View, row: Row) -> tuple[tuple[str, str], ...]:
    """Return the settings that vary and mean something here, the learning rate first.

    Off (null) is a value like any other where it was searched.
    """
    names = view.report.varying or view.report.setting_names
    shown = [
        (n, setting_value(row.get(n)))
        for n in names
        if row.get(n) is not None or _is_searched_off(view, row, n)
    ]
    return tuple(sorted(shown, key=lambda item: item[0] != "learning_rate"))


def _is_searched_off(view: View, row: Row, name: str) -> bool:
    """Say whether null was chosen for a setting, rather than left where it has no meaning."""
    if name not in view.report.varying:
        return False
    means = applying(view.configurations, name, view.report.varying)
    return any(other is row for other in means)


def facts(view: View, row: Row) -> tuple[Fact, ...]:
    """Return the numbers that stand beside every score."""
    if row["score"] is None:
        q = row["search_q"]
        note = "one search trial; nothing was confirmed"
        return (Fact(label="Run score q", value=number(q), note=note),)
    steps = row["num_planned_steps"]
    few = row["num_seeds"] < MIN_SEEDS_FOR_WINNER
    octaves = view.study.confirm.octaves
    margin = margin_text(row, octaves)
    bad, _, bound = bad_steps_text(row).partition("; ")
    return (
        Fact(
            label="Stability score",
            value=score_text(row["score"]),
            note=f"of at most {row['ceiling']:.1f} with {seeds_text(row).split(' of ')[1]}",
        ),
        Fact(
            label="Margin",
            value="0" if margin == "no doubling" else margin.split(" doubling")[0],
            note="doublings of the learning rate" if octaves else "no rung was asked for",
        ),
        Fact(
            label="Seeds",
            value=f"{row['num_stable_seeds']} of {row['num_seeds']}",
            note="not enough seeds to name a winner" if few else "stable, on fresh seeds",
        ),
        Fact(label="Bad steps", value=bad.removesuffix(" bad").removesuffix(" steps"),
             note=f"{bound or bad}{_left_out(view, row)}"),
        Fact(label="Horizon", value=f"{steps:,} steps", note=f"on {plain(view.report.device)}; "
             "longer runs are not certified"),
    )  # fmt: skip


def _left_out(view: View, row: Row) -> str:
    """Say how many steps were not judged because their batch was at fault."""
    left_out = sum(seed["num_data_steps"] or 0 for seed in view.seeds_of(row["config_id"]))
    return f"; {count(left_out, 'step')} with a faulty batch left out" if left_out else ""


def _factors(row: Row) -> tuple[Factor, ...]:
    names = (
        ("A", "calm steps", "calm"),
        ("B", "no spikes", "smooth"),
        ("C", "keeps its gain", "kept"),
        ("P", "progress", "progress"),
        ("Q", "lower bound on q", "q_lower"),
        ("M", "q at higher rates", "mean_margin"),
    )
    return tuple(
        Factor(letter=letter, label=label, value=row[name], text=f"{row[name]:.2f}")
        for letter, label, name in names
        if row[name] is not None
    )


def _ladder(view: View, config_id: str) -> tuple[Step, ...]:
    rungs = {rung.octave: rung for rung in view.rungs(config_id)}
    base = view.by_id[config_id]["learning_rate"]
    if not rungs or base is None:
        return ()
    top = max(view.study.confirm.octaves, *rungs)
    steps = []
    for octave in range(top + 1):
        rung = rungs.get(octave)
        steps.append(
            Step(
                times="base" if octave == 0 else f"\u00d7{2**octave}",
                rate=number(base * 2.0**octave),
                state=RungState.UNTRIED if rung is None else rung.state,
                note="not run" if rung is None else _rung_note(rung),
            )
        )
    return tuple(steps)


def _rung_note(rung: Rung) -> str:
    judged = len(rung.qs) - rung.num_lost
    seeds = f"{rung.num_held} of {count(judged, 'seed')}" if judged else ""
    lost = f"{rung.num_lost} lost" if rung.num_lost else ""
    later = f"then {rung.later.num_held} of {len(rung.later.qs)}" if rung.later else ""
    return ", ".join(text for text in (seeds, lost, later) if text)


def _snippets(view: View, config_id: str) -> tuple[tuple[str, str], ...]:
    settings = view.settings(config_id)
    return (
        ("YAML", snippets.as_yaml(settings)),
        ("GuardedEngine", snippets.as_guarded_engine(settings)),
        ("PyTorch", snippets.as_pytorch(settings, view.report.device)),
        ("Hugging Face", snippets.as_training_arguments(settings)),
    )


def compared(view: View) -> list[str]:
    """Return the configurations that stand side by side: choice, fastest, today's, runners-up."""
    return _worth_comparing(view)[:_MAX_COMPARED]


def left_out_text(view: View) -> str:
    """Say how many others there would be to compare; empty if none."""
    left_out = len(_worth_comparing(view)) - _MAX_COMPARED
    return f"{left_out:,} more stand in configurations.csv" if left_out > 0 else ""


def _worth_comparing(view: View) -> list[str]:
    verdict = view.verdict
    wanted = [verdict.choice, verdict.closest, verdict.fastest, *view.report.start_config_ids[:1],
              *verdict.tied, *verdict.confirmed]  # fmt: skip
    return [c for c in dict.fromkeys(wanted) if c is not None and c in view.by_id]


def _comparison(view: View) -> Comparison | None:
    ids = compared(view)
    if not ids:
        return None
    rows = [view.by_id[c] for c in ids]
    octaves = view.study.confirm.octaves
    body: list[tuple[str, tuple[str, ...]]] = [
        (name, tuple(setting_value(row.get(name)) for row in rows))
        for name in view.report.setting_names
        if len({row.get(name) for row in rows}) > 1
    ]
    body.append(("the bar", tuple(_bar_cell(view, row) for row in rows)))
    body.append(("score S", tuple(_score_cell(row) for row in rows)))
    body.append(("margin", tuple(margin_text(row, octaves) for row in rows)))
    body.append(
        ("stable", tuple(seeds_text(r) if r["num_seeds"] else "not confirmed" for r in rows))
    )
    body.append(
        ("bad steps", tuple(bad_steps_text(r) if r["num_seeds"] else "\u2013" for r in rows))
    )
    for label, name in (("A calm", "calm"), ("B smooth", "smooth"), ("C kept", "kept"),
                        ("P progress", "progress"), ("Q", "q_lower"),
                        ("M", "mean_margin")):  # fmt: skip
        body.append(
            (label, tuple("\u2013" if r[name] is None else f"{r[name]:.2f}" for r in rows))
        )
    body.append(("last probe loss", tuple(number(row["probe_last"]) for row in rows)))
    body += [(name, tuple(_metric_cell(view, c, name) for c in ids)) for name in view.metric_names]
    headings = tuple((role_words(view, c) or "also confirmed", c) for c in ids)
    return Comparison(headings=headings, rows=tuple(body), left_out=left_out_text(view))


def _trade(view: View) -> str:
    """Say what the fastest configuration that meets the bar costs in margin."""
    choice = view.by_id.get(view.verdict.choice or "")
    fastest = view.by_id.get(view.verdict.fastest or "")
    if choice is None or fastest is None:
        return ""
    if choice["config_id"] == fastest["config_id"]:
        return "The choice is also the fastest configuration that meets the bar."
    octaves = view.study.confirm.octaves
    return (
        f"The fastest that meets the bar ends at a probe loss of {number(fastest['probe_last'])} "
        f"against {number(choice['probe_last'])}; its margin is {margin_text(fastest, octaves)} "
        f"against {margin_text(choice, octaves)}."
    )


def _bar_cell(view: View, row: Row) -> str:
    """Say whether a configuration met the bar, or what it missed of it."""
    if not row["num_seeds"]:
        return "not confirmed"
    if row["num_seeds"] < view.study.confirm.seeds:
        return f"run on {row['num_seeds']} of {count(view.study.confirm.seeds, 'seed')} only"
    return "met" if row["meets_bar"] else f"missed: {plain(row['missed'])}"


def _score_cell(row: Row) -> str:
    if row["score"] is None:
        return "\u2013"
    return f"{score_text(row['score'])} of at most {row['ceiling']:.1f}"


def _metric_values(view: View, config_id: str, name: str) -> list[float | None]:
    column = "grad_norm_median" if name == "grad_norm" else f"metric_{name}_last"
    return [row.get(column) for row in view.seeds_of(config_id)]


def _metric_cell(view: View, config_id: str, name: str) -> str:
    values = _metric_values(view, config_id, name)
    known = [value for value in values if value is not None]
    if not known:
        return "\u2013"
    lost = len(values) - len(known)
    mean = number(sum(known) / len(known))
    return f"{mean} ({lost} not finite)" if lost else mean


def targets(view: View, config_id: str) -> tuple[Target, ...]:
    """Compare the worst seed of a configuration with every limit of the space file."""
    found = []
    for name, limit in view.study.targets.items():
        values = _metric_values(view, config_id, name)
        known = [value for value in values if value is not None]
        met: bool | None = None
        if values:
            met = len(known) == len(values) and max(known) <= limit
        label = "gradient norm, median" if name == "grad_norm" else name
        worst = number(max(known)) if known else "not measured"
        found.append(Target(name=plain(label), limit=number(limit), value=worst, met=met))
    return tuple(found)


def _all_outcomes(view: View) -> str:
    if not view.trials:
        return "No trial ended."
    return f"All stages together: {outcomes_text(view, view.trials)}."
