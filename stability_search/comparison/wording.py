"""A comparison as lines for a reader, rows for a spreadsheet, and one object for a program."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from stability_search.comparison.comparing import Comparison
from stability_search.comparison.differences import Difference
from stability_search.comparison.pairs import LEVEL, PairedTest, Pairing
from stability_search.comparison.sides import Row, Side
from stability_search.inert import plain
from stability_search.records.values import Json
from stability_search.report.wording import (
    OUTCOME_WORDS,
    count,
    margin_text,
    percent_at_most,
    score_text,
    seeds_text,
)
from stability_search.space.writing import flow_text

SCHEMA = "stability-search/comparison/1"
_FACTS = (
    "score", "ceiling", "q_lower", "margin_octaves", "margin_is_capped", "num_seeds",
    "num_stable_seeds", "num_planned_steps", "num_bad_steps", "num_judged_steps",
    "bad_rate_bound", "calm", "smooth", "kept", "progress", "probe_last", "meets_bar",
)  # fmt: skip
_FACTORS = (("A", "calm"), ("B", "smooth"), ("C", "kept"), ("P", "progress"))
_CELL = 44  # characters of a value that a line shows
_SECONDS_PER_HOUR = 3600
_FEW = 20  # pairs up to which patterns are counted out
_NOTHING = "-"
_CHOSEN = (
    "Both were chosen with the help of these very seeds, which flatters them; and one test is "
    "one look: of many runs compared with each other, some differ by chance."
)


def as_lines(comparison: Comparison) -> list[str]:
    """Return a comparison for a reader; a terminal's control characters are not taken out."""
    lines = [f"{name}: {path}" for name, path in zip("AB", comparison.paths, strict=True)]
    lines += ["", *_verdict_lines(comparison)]
    lines += ["", *_aligned([("", "A", "B"), *_side_rows(comparison.sides)])]
    lines += ["(rates of bad steps are bounded at 95 % confidence, if steps are independent)"]
    lines += ["", *_setting_lines(comparison)]
    lines += ["", *_difference_lines("what was asked of the two studies", comparison.space)]
    if comparison.pairing is not None:
        lines += ["", *_test_lines(comparison.pairing)]
    return [*lines, *(["", *_caveat_lines(comparison)] if comparison.caveats else [])]


def as_rows(comparison: Comparison) -> list[dict[str, Json]]:
    """Return a comparison as rows of four cells: which part, which name, and both values."""
    first, second = (_side(side) for side in comparison.sides)
    paths = comparison.paths
    found: list[tuple[str, str, Json, Json]]
    found = [("run", "path", str(paths[0]), str(paths[1]))]
    found += [("run", name, first[name], second[name]) for name in first if name != "outcomes"]
    found += [
        (
            "outcome",
            str(name),
            comparison.sides[0].outcomes[name],
            comparison.sides[1].outcomes[name],
        )
        for name in OUTCOME_WORDS
    ]
    found += [("setting", one.name, one.first, one.second) for one in comparison.settings]
    found += [("space", one.name, one.first, one.second) for one in comparison.space]
    test = comparison.pairing.test if comparison.pairing else None
    if test is not None:
        found += [("q by seed", str(pair.seed), pair.first, pair.second) for pair in test.pairs]
        found += [
            ("test", "mean_difference", test.mean_difference, None),
            ("test", "p_value", test.p_value, None),
            ("test", "least_p", test.least_p, None),
        ]
    found += [("not comparable", reason, None, None) for reason in comparison.reasons]
    found += [("bear in mind", caveat, None, None) for caveat in comparison.caveats]
    names = ("part", "name", "first", "second")
    return [dict(zip(names, row, strict=True)) for row in found]


def as_document(comparison: Comparison) -> dict[str, Json]:
    """Return a comparison as strict JSON; unknown is None. Within schema 1 keys are only added."""
    pairing = comparison.pairing or Pairing(why_not="The runs cannot be compared.")
    first, second = (
        {"run_directory": str(path), **_side(side)}
        for path, side in zip(comparison.paths, comparison.sides, strict=True)
    )
    return {
        "schema": SCHEMA,
        "first": first,
        "second": second,
        "is_comparable": not comparison.reasons,
        "reasons": list(comparison.reasons),
        "caveats": list(comparison.caveats),
        "settings": [asdict(one) for one in comparison.settings],
        "space": [asdict(one) for one in comparison.space],
        "test": None if pairing.test is None else _test(pairing.test),
        "why_no_test": pairing.why_not or None,
        "lost": list(pairing.lost),
    }


def _side(side: Side) -> dict[str, Json]:
    row = side.headline or {}
    return {
        "verdict": side.verdict.value,
        "choice_reason": None if side.choice_reason is None else side.choice_reason.value,
        "reason": side.reason,
        "config_id": row.get("config_id"),
        "role": row.get("role"),
        "score_version": side.score_version,
        **{name: row.get(name) for name in _FACTS},
        "num_trials": len(side.trials),
        "outcomes": dict(side.outcomes),
        "num_steps": _total(side, "num_steps"),
        "wall_s": _total(side, "wall_s"),
    }


def _test(test: PairedTest) -> dict[str, Json]:
    return {
        "num_pairs": len(test.pairs),
        "mean_difference": test.mean_difference,
        "p_value": test.p_value,
        "least_p": test.least_p,
        "e0": test.e0,
        "delta": test.delta,
        "pairs": [asdict(pair) for pair in test.pairs],
    }


def _total(side: Side, column: str) -> float:
    return sum(row[column] or 0 for row in side.trials)


def _verdict_lines(comparison: Comparison) -> list[str]:
    if comparison.reasons:
        return [
            "not comparable: q does not mean the same in both, so nothing is tested",
            *(f"  {plain(reason)}" for reason in comparison.reasons),
        ]
    first, second = comparison.sides
    shared = {
        "task": first.space.task_name,
        "horizon": count(first.horizon, "step"),
        "device": " and ".join(sorted(first.seen("device") & second.seen("device"))),
        "score version": first.score_version if second.score_version else None,
    }
    same = [f"{name} ({plain(value)})" for name, value in shared.items() if value]
    return [f"comparable: the same {', '.join(same)}"]


def _caveat_lines(comparison: Comparison) -> list[str]:
    return ["bear in mind", *(f"  {plain(text)}" for text in comparison.caveats)]


def _aligned(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    cells = list(rows)
    widths = [max((len(row[place]) for row in cells), default=0) for place in (0, 1)]
    return [
        f"{name:<{widths[0]}}  {first:<{widths[1]}}  {second}".rstrip()
        for name, first, second in cells
    ]


def _side_rows(sides: tuple[Side, Side]) -> list[tuple[str, str, str]]:
    first, second = (_side_cells(side) for side in sides)
    rows = [(name, first[name], second[name]) for name in first]
    return [row for row in rows if row[1:] != ("0", "0")]  # an outcome that neither had


def _side_cells(side: Side) -> dict[str, str]:
    reason = "" if side.choice_reason is None else f" ({side.choice_reason})"
    return {
        "verdict": f"{side.verdict}{reason}",
        **_headline_cells(side),
        "trials": f"{len(side.trials):,}",
        **{f"  {words}": f"{side.outcomes[name]:,}" for name, words in OUTCOME_WORDS.items()},
        "steps": f"{_total(side, 'num_steps'):,.0f}",
        "time in trials": f"{_total(side, 'wall_s') / _SECONDS_PER_HOUR:.2f} h",
    }


def _headline_cells(side: Side) -> dict[str, str]:
    """Return the score with all it never stands without; dashes where nothing was confirmed."""
    row = side.headline
    names = ("score", "factors", "Q", "margin", "seeds", "bad steps", "horizon", "last probe")
    if row is None:
        return dict.fromkeys(("configuration", *names), _NOTHING)
    cells = {"configuration": f"{plain(row['config_id'])} ({row['role']})"}
    if row["score"] is None:
        return cells | dict.fromkeys(names, _NOTHING)
    return cells | {
        "score": f"{score_text(row['score'])} of at most {_number(row['ceiling'], '.1f')}",
        "factors": ", ".join(f"{letter} {_number(row[name], '.2f')}" for letter, name in _FACTORS),
        "Q": _number(row["q_lower"], ".3f"),
        "margin": margin_text(row, side.space.study.confirm.octaves),
        "seeds": f"{seeds_text(row)} stable",
        "bad steps": _bad_steps(row),
        "horizon": f"{_number(row['num_planned_steps'], ',')} steps",
        "last probe": _number(row["probe_last"], ".4g"),
    }


def _bad_steps(row: Row) -> str:
    if not row["num_judged_steps"] or row["bad_rate_bound"] is None:
        return _NOTHING
    bound = percent_at_most(row["bad_rate_bound"])
    return f"{row['num_bad_steps']:,} of {row['num_judged_steps']:,}, at most {bound}"


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def _setting_lines(comparison: Comparison) -> list[str]:
    title = "settings of the two configurations"
    if any(side.headline is None for side in comparison.sides):
        return [f"{title}: there are not two"]
    return _difference_lines(title, comparison.settings)


def _difference_lines(title: str, found: Sequence[Difference]) -> list[str]:
    if not found:
        return [f"{title}: none differs"]
    return [title, *_aligned((f"  {plain(one.name)}", *_values(one)) for one in found)]


def _values(one: Difference) -> tuple[str, str]:
    first = _value(one.first, is_named=one.is_in_first)
    second = _value(one.second, is_named=one.is_in_second)
    shown = _short(first), _short(second)
    return (shown[0], "another; --format json shows both") if shown[0] == shown[1] else shown


def _value(value: Json, *, is_named: bool) -> str:
    if is_named:
        return flow_text(value)
    return "not named" if value is None else f"{flow_text(value)} (default)"


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _test_lines(pairing: Pairing) -> list[str]:
    lost = [f"left out: {plain(text)}" for text in pairing.lost]
    test = pairing.test
    if test is None:
        return [f"no test: {plain(pairing.why_not)}", *lost]
    rows = [("  seed", "A", "B")]
    rows += [(f"  {pair.seed}", f"{pair.first:.3f}", f"{pair.second:.3f}") for pair in test.pairs]
    return [
        f"q by seed, with E_0 {test.e0:.4g} and Delta {test.delta:.4g} for both",
        *_aligned(rows),
        f"mean of A minus B: {test.mean_difference:+.3f}; {_p_text(test)}",
        _conclusion(test),
        *([] if test.p_value == 1 else [_CHOSEN]),
        *lost,
    ]


def _p_text(test: PairedTest) -> str:
    n = len(test.pairs)
    p = f"exact two-sided sign-flip test p = {test.p_value:.4g}"
    if n > _FEW:
        return p
    return f"{p} ({round(test.p_value * 2**n):,} of {count(2**n, 'pattern')} of signs)"


def _conclusion(test: PairedTest) -> str:
    pairs = count(len(test.pairs), "pair")
    if all(pair.first == pair.second for pair in test.pairs):
        return f"q is the same on each of {pairs}."
    if test.p_value <= LEVEL:
        higher = "A" if test.mean_difference > 0 else "B"
        return (
            f"{higher} has the higher q on {pairs}: were the two alike, so large a difference "
            f"would come by chance in {test.p_value:.2%} of cases. It holds for this task and "
            "horizon."
        )
    if test.least_p > LEVEL:
        return (
            f"{pairs} cannot give a p below {test.least_p:.4g}, so they cannot show a difference "
            f"at the 5 % level, however large; {_enough()} could. Nothing is concluded."
        )
    return f"{pairs} do not show a difference at the 5 % level; that is not to say there is none."


def _enough() -> int:
    """Return the smallest number of pairs whose least p is at most `LEVEL`."""
    n = 1
    while 2.0 ** (1 - n) > LEVEL:
        n += 1
    return n
