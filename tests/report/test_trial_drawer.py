"""The drawer of a trial: what the page holds for it, and the command that repeats a trial."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Stage
from stability_search.report import render_html
from stability_search.report.context import View
from stability_search.report.curves import MAX_CURVES
from stability_search.report.parts import trial_drawer
from tests.report.browsing import OpenPage, check_quiet
from tests.report.study_reports import report_of, report_with_steps
from tests.report.study_steps import reader_of
from tests.study_rows import empty_study, stable_study

ROOT = Path(__file__).resolve().parents[2]


def test_every_bad_step_has_its_reason_and_place() -> None:
    view = View(report_with_steps(stable_study()))
    drawer = trial_drawer.build(view)
    words = drawer.data["words"]
    assert len(drawer.entries) == len(drawer.data["trials"]) == MAX_CURVES
    num_bad = 0
    for curve in view.curves.shown:
        held = drawer.data["trials"][trial_drawer.key_of(curve.row)]
        assert len(held["steps"]) == (curve.row["num_bad_steps"] or 0)
        assert len(held["facts"]) == len(drawer.data["columns"])
        for step, label, reason, module, *_ in held["steps"]:
            num_bad += 1
            assert 1 <= step <= curve.row["num_steps"]
            assert (words[label], words[reason], words[module]) == (
                "bad",
                "loss is NaN",
                "loss is NaN",
            )
    assert num_bad > 0
    json.dumps(drawer.data, allow_nan=False)


def test_paths_in_the_drawer_hide_the_home() -> None:
    drawer = trial_drawer.build(View(report_with_steps(stable_study())))
    assert drawer.data["run"] == "~/reports/teacher-20260301-0900"
    assert "/home/someone" not in json.dumps(drawer.data)


def test_without_steps_the_drawer_says_why() -> None:
    assert trial_drawer.build(View(report_of(empty_study()))).absent.startswith("No trial")
    without = trial_drawer.build(View(report_of(stable_study())))
    assert "not at hand" in without.absent
    assert without.entries == ()


def test_a_retried_trial_is_told_from_its_first_attempt() -> None:
    first = View(report_of(stable_study())).trials[0]
    assert trial_drawer.key_of(first) != trial_drawer.key_of({**first, "attempt": 2})


def command_of(drawer: trial_drawer.Drawer, trial_id: str) -> str:
    """Fill the command in as the page's script does."""
    blanks = {"run": drawer.data["run"], "trial": trial_id, "attempt": 1, "device": "cpu"}
    text = drawer.data["repeat"]
    for name, value in blanks.items():
        text = text.replace(f"{{{name}}}", json.dumps(value))
    return str(text)


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_the_command_repeats_a_trial_to_the_digit(tmp_path: Path) -> None:
    from stability_search import space as spaces
    from stability_search.search import run_directory
    from stability_search.settings.trial import TrialConstants
    from stability_search.step_files import encode_steps, write_steps
    from stability_search.trial import run_trial
    from tests.study_rows import settings, summary_of, trial_row

    (tmp_path / "tiny_task.py").write_text((ROOT / "tests" / "tiny_task.py").read_text())
    (tmp_path / "space.yaml").write_text(
        "task: ./tiny_task.py:Tiny\ntask_args: {behaviour: nan_batch}\ntrial: {steps: 30}\n"
        "fixed: {batch_size: 4, clip_norm: 1.0}\n"
        "space:\n  learning_rate: {loguniform: {low: 1e-4, high: 1}}\n"
    )
    space = spaces.load(tmp_path / "space.yaml")
    facts = run_directory.study_facts(space)
    run = run_directory.create(tmp_path / "run", space, facts=facts, environment={})
    values = space.settings({"learning_rate": 0.01})
    config = space.trial_config(values, seed=4711, steps=30, device="cpu")
    trial = run_trial(config, constants=TrialConstants(probe_steps=(0, 15, 30)))
    records = []
    while True:
        try:
            records.append(next(trial).record)
        except StopIteration as end:
            summary = end.value
            break
    synthetic = trial_row(
        Stage.SEARCH, 0, settings(), summary_of(settings(), steps=30), config_id="x"
    )
    row = replace(synthetic, settings=values, summary=summary, seed=4711, trial_id="search-0000")
    write_steps(run.step_file("search-0000"), encode_steps(records), row)
    report = report_of(stable_study(), run_directory=str(run.path))
    command = command_of(trial_drawer.build(View(report)), "search-0000")
    done = subprocess.run(  # noqa: S603 - the command under test
        ["/bin/bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    lines = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    expected = [[str(r.step), str(r.label), str(r.loss)] for r in records]
    assert [line[:3] for line in lines] == expected, done.stderr
    assert {record.label for record in records} >= {"ok"}


@pytest.mark.browser
@pytest.mark.timeout(120)
def test_only_bad_steps_are_marked_as_bad_and_single_values_are_drawn(open_page: OpenPage) -> None:
    """A step whose batch was at fault stands on the rail in grey, and makes no trial bad."""
    case = stable_study()
    read = reader_of(case)

    def faulty(trial_id: str) -> list[StepRecord]:
        steps = [*read(trial_id)][:4]
        return [
            replace(step, label=StepLabel.DATA, reason="batch holds NaN", loss=None)
            if step.step % 2
            else step
            for step in steps
        ]

    watched = open_page(render_html(report_of(case, read_steps=faulty)))
    page = watched.page
    row = page.locator("#trial tbody tr", has_text="stable (completed").first
    row.locator("button.opens").press("Enter")
    loss = page.locator("dialog[open] .curve").first
    loss.locator(".main-svg").first.wait_for()
    strokes = loss.locator(".xy2 path.point").evaluate_all("es => es.map((e) => e.style.stroke)")
    resolved = """(name) => {
        const e = document.createElement('p');
        e.style.color = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
        return e.style.color;
    }"""
    assert set(strokes) == {page.evaluate(resolved, "--muted")}
    assert page.evaluate(resolved, "--stop") not in strokes
    assert loss.locator(".xy path.point").count() == 2
    check_quiet(watched)
