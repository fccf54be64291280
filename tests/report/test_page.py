"""The page as text: one file, a strict policy, the same bytes, private, bounded."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from stability_search.errors import StoppedEarlyError
from stability_search.report import render_html, write_report
from stability_search.report.context import View
from stability_search.report.curves import MAX_CURVES
from stability_search.report.figures import (
    MAX_MARKS,
    DataTable,
    Figure,
    Mark,
    Panel,
    Section,
    figure_key,
    plot_text,
)
from stability_search.report.page import PLOTLY_VERSION, script_json
from tests.report.study_reports import report_of, report_with_steps
from tests.study_rows import (
    StudyCase,
    empty_study,
    hopeless_study,
    interrupted_study,
    pilot_rows,
    search_rows,
    stable_study,
)

ASSETS = files("stability_search.report") / "assets"
MAKERS = [stable_study, hopeless_study, interrupted_study, empty_study]


def test_the_vendored_bundle_is_the_version_that_plotly_ships() -> None:
    from plotly.offline import get_plotlyjs_version

    head = (ASSETS / "plotly-cartesian.min.js").read_text(encoding="utf-8")[:200]
    assert f"(cartesian - minified) v{PLOTLY_VERSION}" in head
    assert get_plotlyjs_version() == PLOTLY_VERSION


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_same_study_gives_the_same_page(make: Callable[[], StudyCase]) -> None:
    assert render_html(report_of(make())) == render_html(report_of(make()))


def test_every_script_that_runs_is_named_by_its_hash() -> None:
    html = render_html(report_of(stable_study()))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    text = policy[1].replace("&#39;", "'")
    assert text.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in text
    assert "unsafe-inline" not in text.split("style-src")[0]
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in text


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = render_html(report_of(stable_study()))
    own = html.replace((ASSETS / "plotly-cartesian.min.js").read_text(encoding="utf-8"), "")
    assert re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', own) == []
    assert "url(" not in own
    assert "@import" not in own


def test_data_for_scripts_can_neither_end_the_element_nor_be_nan() -> None:
    assert script_json(["</script>&\u2028"]) == '["\\u003c/script\\u003e\\u0026\\u2028"]'
    with pytest.raises(ValueError, match="Out of range float values"):
        script_json([float("nan")])


def test_text_for_plotly_is_neutral_and_short() -> None:
    assert plot_text("<b>$x$ & y</b>") == "&lt;b&gt;&#36;x&#36; &amp; y&lt;/b&gt;"
    assert len(plot_text("a" * 500)) == 60


def test_what_cannot_be_seen_is_spelled_out_in_the_space_file() -> None:
    html = render_html(report_of(empty_study(), space_text="a: 1\r\n# \u202ehidden\u061c\x1b\tb"))
    assert "a: 1\n# \\u202ehidden\\u061c\\x1b\tb" in html


def test_a_picture_of_a_drawing_has_its_title_and_legend() -> None:
    mark = Mark(key="stable", label="<b>$1", symbol="circle")
    panel = Panel(title="long " * 30 + "<i>", spec={}, series=(("a & b", "series-1"),))
    table = DataTable(columns=(), rows=())
    figure = Figure(name="f", finding="", panels=(panel,), legend=(mark,), table=table)
    section = Section(name="s", title="Title", question="?", figures=(figure,))
    key = figure_key(section, figure, panel)
    assert key["title"].count("<br>") == 2
    assert key["title"].endswith("long &lt;i&gt;")
    assert key["legend"] == [
        ("a &amp; b", "swatch series-1", ""),
        ("&lt;b&gt;&#36;1", "mark-stable", "circle"),
    ]
    plainly = replace(figure, is_legend_plain=True)
    assert figure_key(section, plainly, panel)["legend"][1][1] == "mark-plain"
    assert figure_key(section, figure, replace(panel, title=""))["title"] == "Title"


def test_home_and_hosts_do_not_appear() -> None:
    report = report_of(
        stable_study(), space_text="task: /home/someone/x.py:T  # gpu-box-0.lab.example"
    )
    html = render_html(report)
    assert "/home/someone" not in html
    assert "~/x.py" in html
    assert "gpu-box" not in html
    assert "node-2" in html


def test_seeds_are_shown_whole() -> None:
    assert "8675309000000001" in render_html(report_of(stable_study()))


def test_a_figure_without_data_is_one_sentence() -> None:
    html = render_html(report_of(empty_study()))
    assert "<figure" not in html
    for sentence in (
        "No trial has ended with a result yet.",
        "No trial has read its probe yet.",
        "No trial has ended yet.",
        "No candidate has been confirmed yet.",
    ):
        assert sentence in html


def test_the_card_answers_what_how_far_and_how_sure() -> None:
    html = render_html(report_of(stable_study()))
    for words in (
        "Stable over 400 steps",
        "of at most 77.3 with 5 seeds",
        "at most 0.15 % at 95 % confidence",
        "learning_rate: 0.008",
        "GuardedEngine(model, settings)",
        "torch.optim.AdamW(model.parameters(), lr=0.008",
        "TrainingArguments(",
        "today&#39;s",
        "its margin is 2 doublings against at least 3 doublings",
    ):
        assert words in html


def test_the_card_of_a_hopeless_study_says_what_broke_and_what_to_change() -> None:
    html = render_html(report_of(hopeless_study()))
    titles = ("What it missed", "What broke the others", "What came closest", "What to change")
    for words in ("No stable configuration", *titles, "upper end of learning_rate"):
        assert words in html


@pytest.mark.parametrize("host", ["search", "completed", "confirm"])
def test_a_host_may_be_named_like_a_word_of_ours(host: str) -> None:
    case = stable_study()
    renamed = replace(case, rows=tuple(replace(row, node=host) for row in case.rows))
    view = View(report_of(renamed))
    plain = View(report_of(case))
    assert view.outcomes == plain.outcomes
    assert [row["trial_id"] for row in view.trials] == [r["trial_id"] for r in plain.trials]
    assert {row["node"] for row in view.trials} == {"node-1"}


def test_ten_and_more_numbered_hosts_stay_apart() -> None:
    """One name begins like another: `worker-1` and `worker-10`."""
    case = stable_study()
    rows = tuple(
        replace(
            row,
            node=f"worker-{i % 12}",
            summary=replace(row.summary, reason=f"lost worker-{i % 12}."),
        )
        for i, row in enumerate(case.rows)
    )
    view = View(report_of(replace(case, rows=rows)))
    nodes = {row.node: shown["node"] for row, shown in zip(rows, view.trials, strict=True)}
    assert sorted(nodes.values()) == sorted(f"node-{i}" for i in range(1, 13))
    for shown in view.trials:
        assert shown["reason"] == f"lost {shown['node']}."


def two_hundred_trials() -> StudyCase:
    case = stable_study()
    more = [
        replace(row, index=row.index + 48 * k, trial_id=f"{row.trial_id}-{k}")
        for k in range(1, 4)
        for row in search_rows()
    ]
    return replace(case, rows=(*case.rows, *more[:110]))


def test_two_hundred_trials_stay_under_three_megabytes_and_three_seconds() -> None:
    case = two_hundred_trials()
    assert len(case.rows) == 200
    started = time.process_time()  # of this process alone: others may be busy
    html = render_html(report_with_steps(case))
    took = time.process_time() - started
    assert html.count('class="opens"') == MAX_CURVES
    assert len(html.encode()) <= 3_000_000
    assert took < 6  # twice the promise: machines are noisy


def test_beyond_a_thousand_trials_the_list_ends_and_says_so() -> None:
    rows = [replace(row, index=i, trial_id=f"t{i}") for i, row in enumerate(pilot_rows() * 145)]
    html = render_html(report_of(replace(empty_study(), rows=tuple(rows))))
    assert "1,000 trials; 15 more in trials.parquet" in html
    assert "715 more rows stand in trials.parquet" in html
    assert f"Of 1,015 trials, {MAX_MARKS:,} are drawn one by one, evenly chosen" in html
    assert len(html.encode()) <= 5_000_000


def test_the_list_of_a_large_study_keeps_every_confirmed_trial() -> None:
    case = stable_study()
    more = [
        replace(row, index=100 + i, trial_id=f"s{i}") for i, row in enumerate(search_rows() * 25)
    ]
    confirmed = [row.trial_id for row in case.rows if row.stage == "confirm"]
    html = render_html(report_of(replace(case, rows=(*case.rows, *more))))
    listed = html.partition('id="all-trials"')[2]
    assert confirmed
    assert all(f"<td>{trial_id}</td>" in listed for trial_id in confirmed)


def test_all_three_files_are_written_and_strict(tmp_path: Path) -> None:
    written = write_report(report_of(stable_study()), tmp_path)
    assert [path.name for path in written] == ["report.html", "report.md", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in written)
    json.loads(written[2].read_text(), parse_constant=pytest.fail)


def test_a_folder_that_is_not_there_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(StoppedEarlyError, match=r"report\.html: could not be written"):
        write_report(report_of(empty_study()), tmp_path / "missing")


def test_a_report_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from tests.report.study_reports import report_of\n"
        "from tests.study_rows import stable_study\n"
        "from stability_search.report import render_html\n"
        "assert 'plotly' not in sys.modules\n"
        "render_html(report_of(stable_study()))\n"
        "print([m for m in ('torch', 'ray', 'optuna', 'plotly') if m in sys.modules])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(  # noqa: S603 - our own interpreter and text
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr
