"""The words of a dry run; what it finds out is tested beside `search.dry_run`."""

import dataclasses
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search import dry_run
from stability_search.search.timing import Timing

SPACE = """\
name: small
task: {task}
trial: {{steps: 20}}
fixed: {{batch_size: 2}}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
  clip_norm: {{choice: [null, 1.0]}}
start_with: [{{learning_rate: 0.01, clip_norm: 1.0}}]
search: {{trials: 2, resources: {{gpu: 0}}, time_budget_s: 600, max_concurrent: 1}}
confirm: {{top: 1, seeds: 2, steps: 30, octaves: 0, min_margin: 0}}
"""
TASK = """
class Mine:
    def __init__(self): ...
"""
GOOD = Timing(setup_s=1.25, probe_s=0.025, step_s=0.5, end=None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SPACE.format(task="teacher"))
    (tmp_path / "mine.yaml").write_text(SPACE.format(task="./mine.py:Mine"))
    (tmp_path / "mine.py").write_text(TASK)
    return tmp_path


def lines_of(
    timing: Timing,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *words: str,
    code: int = 0,
) -> list[str]:
    monkeypatch.setattr(dry_run, "time_first", lambda *_: timing)
    assert main(["run", "--dry-run", *words]) == code
    return capfd.readouterr().out.splitlines()


def test_line_by_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = lines_of(GOOD, monkeypatch, capfd, "--space", "small", "--output", "out")

    assert lines[0].startswith("small.yaml: ok. 2 settings vary")
    assert lines[1].startswith("pilot: 7 trials of 30 steps in fp32, learning rates 0.001, ")
    assert lines[2] == "search: 2 trials of 20 steps"
    assert lines[3].startswith("confirm: 2 to ")
    assert lines[4].endswith("search.time_budget_s ends it after 10 min")
    assert lines[5] == "resources: 1 CPU and no GPU a trial; 1 trial at once on this machine"
    assert lines[6].startswith("configuration 0 ")
    assert lines[6].endswith(": batch_size=2 learning_rate=0.01 clip_norm=1")
    assert lines[7].startswith("configuration 1 ")
    assert lines[8] == "files: in out; no file is copied for the task teacher"
    assert lines[9] == "uploaded: nothing; trials run on this machine"
    assert lines[10].startswith("disk: about 1 MiB at most, ")
    assert lines[11].startswith("time: about 3 min to ")
    assert lines[11].endswith("500 ms a step, 1.2 s to begin a trial, 25 ms to read the probe")
    assert lines[12] == "nothing was started and nothing written"
    assert sorted(path.name for path in folder.iterdir()) == ["mine.py", "mine.yaml", "small.yaml"]


@pytest.mark.usefixtures("folder")
def test_a_step_budget_that_the_pilot_uses_up_is_said_with_one_that_is_enough(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def warnings(budget: int) -> list[str]:
        words = ("--space", "small", "--set", f"search.step_budget={budget}")
        lines = lines_of(GOOD, monkeypatch, capfd, *words)
        return [line for line in lines if line.startswith("warning: ")]

    (warning,) = warnings(420)  # the pilot is 7 trials of 30 steps, the search 2 of 20
    assert "no search trial can start" in warning
    assert "it takes 210 steps" in warning
    assert "search.step_budget=420" in warning
    assert warning.endswith("; 500 would do")
    assert warnings(421) == warnings(500) == []


@pytest.mark.usefixtures("folder")
def test_a_file_of_ones_own_is_copied_and_a_cluster_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--space", "mine", "--output", "out", "--address", "head:1")
    text = "\n".join(lines_of(GOOD, monkeypatch, capfd, *words))

    assert "files: in out; mine.py is copied there" in text
    assert "head:1 was not asked" in text
    assert "uploaded: 1 file, 0.0 KiB, to every node: mine.py" in text
    assert "time: not estimated, it depends on where trials run; measured from" in text


def test_what_a_task_imports_and_what_will_not_be_sent_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "real.py").write_text("")
    (folder / "linked.py").symlink_to(folder / "elsewhere" / "real.py")
    (folder / "mine.py").write_text("import linked\n" + TASK)
    words = ("--space", "mine", "--output", "out", "--address", "head:1")

    (note,) = [
        line for line in lines_of(GOOD, monkeypatch, capfd, *words) if line.startswith("note: ")
    ]

    assert "linked.py" in note


@pytest.mark.usefixtures("folder")
def test_a_loss_that_is_not_finite_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = dataclasses.replace(GOOD, num_steps=5, num_nonfinite=4)

    lines = lines_of(bad, monkeypatch, capfd, "--space", "small")

    assert [line.partition(";")[0] for line in lines if line.startswith("loss: ")] == [
        "loss: infinite or NaN in 4 of the first 5 steps of configuration 0"
    ]
    good = lines_of(GOOD, monkeypatch, capfd, "--space", "small")
    assert not [line for line in good if line.startswith("loss: ")]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("outcome", "code", "says"),
    [
        (Outcome.USER_ERROR, 5, "time: unknown: configuration 0 ended as user_error (boom)"),
        (Outcome.DIVERGED, 0, "time: unknown: configuration 0 ended as diverged (boom)"),
    ],
)
def test_a_first_configuration_that_ends_at_once_is_named_after_all_else(
    outcome: Outcome,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    end = TrialSummary(outcome=outcome, reason="boom", num_planned_steps=20)
    failed = Timing(setup_s=0.0, probe_s=0.0, step_s=None, end=end)

    lines = lines_of(failed, monkeypatch, capfd, "--space", "small", code=code)

    assert says in lines
    assert any(line.startswith("configuration 1 ") for line in lines)
