"""The page: every part in order, in one offline file under a policy that runs our scripts only."""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from stability_search.inert import inert
from stability_search.report.context import Report, View
from stability_search.report.curve_data import columns_of
from stability_search.report.figures import MARKS, figure_key
from stability_search.report.parts import (
    appendix,
    attention,
    effects,
    gradients,
    guard_ledger,
    ladders,
    loss_scale,
    origins,
    outcomes,
    sensitivity,
    stability_map,
    survival,
    trial_drawer,
    verdict_card,
)
from stability_search.report.wording import headline

PLOTLY_VERSION = "4.1.1"
"""Version of the vendored plotly.js bundle: the one that plotly.py ships."""

_PARTS = (
    stability_map.build,
    sensitivity.build,
    survival.build,
    loss_scale.build,
    origins.build,
    gradients.build,
    attention.build,
    outcomes.build,
    effects.build,
    ladders.build,
    guard_ledger.build,
)


def render_html(report: Report) -> str:
    """Draw the page of a study: one file that needs no network.

    Args:
        report: What to draw.

    Returns:
        The whole document; the same report gives the same text.
    """
    return page_of(View(report))


def page_of(view: View) -> str:
    """Draw the page of a study that has been looked at already."""
    report = view.report
    sections = [build(view) for build in _PARTS]
    specs = {
        f"{figure.name}-{i}": {**panel.spec, "key": figure_key(section, figure, panel)}
        for section in sections
        for figure in section.figures
        for i, panel in enumerate(figure.panels)
    }
    curves = [columns_of(curve) for curve in view.curves.shown]
    drawer = trial_drawer.build(view)
    scripts = {name: _asset(name) for name in ("plotly-cartesian.min.js", "report.js")}
    return _template().render(
        title=f"{report.study.name}: {headline(view)}",
        study=report.study,
        task_name=report.task_name,
        period=_period(view),
        num_trials=len(view.trials),
        card=verdict_card.build(view),
        sections=sections,
        drawer=drawer,
        appendix=appendix.build(view),
        marks=MARKS,
        policy=_policy(tuple(scripts.values())),
        style=Markup(_asset("report.css")),  # noqa: S704 - our own file
        plotly=Markup(scripts["plotly-cartesian.min.js"]),  # noqa: S704 - vendored, pinned by hash
        script=Markup(scripts["report.js"]),  # noqa: S704 - our own file
        specs=Markup(script_json(specs)),  # noqa: S704 - escaped by script_json
        trials=Markup(script_json(drawer.data)),  # noqa: S704 - escaped by script_json
        curves=Markup(script_json(curves)),  # noqa: S704 - escaped by script_json
    )


def script_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Return strict JSON that cannot end or open a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


@cache
def _asset(name: str) -> str:
    return (files("stability_search.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("stability_search.report", "templates"),
        autoescape=True,
        finalize=_in_sight,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _in_sight(value: Any) -> Any:  # noqa: ANN401 - whatever a template shows
    """Spell out what cannot be seen, so that no text stands elsewhere than it seems to."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return inert(value, keeps="\n\t") if is_text else value


@cache
def _policy(scripts: tuple[str, ...]) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _period(view: View) -> str:
    """Return when the trials started, to the minute: the page itself carries no clock."""
    starts = sorted(
        row["started_at"][:16].replace("T", " ") for row in view.trials if row["started_at"]
    )
    if not starts:
        return ""
    return f"{starts[0]} to {starts[-1]} UTC" if starts[0] != starts[-1] else f"{starts[0]} UTC"
