"""Commands, what they print where, and their exit codes; the study behind them is scripted."""

import contextlib
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import stability_search.search
from stability_search.cli import main
from stability_search.errors import (
    InfrastructureError,
    StabilitySearchError,
    StoppedEarlyError,
    UserCodeError,
)
from stability_search.events import Event
from stability_search.records.verdict import Verdict, VerdictKind

SPACE = """\
task: teacher
seed: 0
fixed:
  batch_size: 2
space:
  learning_rate: {loguniform: {low: 1e-4, high: 0.3}}
  precision: {choice: [fp32, fp16]}
  init_scale: {choice: [1024, 65536], when: {precision: fp16}}
"""
ONE = """\
task: teacher
fixed: {learning_rate: 1e-3, batch_size: 2}
confirm: {seeds: 1}
"""
AGAIN = "stability-search run --space 'a run/space.yaml'"


class TerminatedError(StabilitySearchError):
    exit_code = 143


@dataclass
class FakeStudy:
    """Stands in for the study: notes what it was asked, and ends as told."""

    directory: Path
    kind: VerdictKind = VerdictKind.STABLE
    exit_code: int = 0
    raises: Exception | None = None
    on_play: Callable[[], object] = lambda: None
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def end(self) -> Any:  # noqa: ANN401 - stands in for Study
        verdict = Verdict(kind=self.kind, exit_code=self.exit_code)
        return types.SimpleNamespace(
            directory=self.directory, verdict=verdict, lines=("the \x1b[1mverdict",)
        )

    def run_study(self, space: object, **options: Any) -> object:  # noqa: ANN401
        self.calls.append(("run", {"space": space, **options}))
        return self._play(options["on_event"])

    def resume_study(self, run: Path, overrides: object, **options: Any) -> object:  # noqa: ANN401
        self.calls.append(("resume", {"run": run, "overrides": overrides, **options}))
        return self._play(options["on_event"])

    def render_run(self, run: Path) -> object:
        self.calls.append(("report", {"run": run}))
        return self.end()

    def _play(self, on_event: Callable[[Event], None]) -> object:
        self.directory.mkdir(exist_ok=True)
        self.on_play()
        fields = {"run_directory": str(self.directory), "device": "cpu", "trials": 2, "slots": 1}
        on_event(Event(name="study_started", time="2026-03-01T12:00:00Z", fields=fields))
        if self.raises is not None:
            raise self.raises
        (self.directory / "report.html").write_text("")
        return self.end()


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStudy]:
    fake = FakeStudy(tmp_path / "a run")
    for part, names in (
        ("study", ("run_study", "resume_study")),
        ("closing", ("render_run",)),
    ):
        module = types.ModuleType(f"stability_search.search.{part}")
        for name in names:
            setattr(module, name, getattr(fake, name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(stability_search.search, part, module, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher.yaml").write_text(SPACE)
    (tmp_path / "one.yaml").write_text(ONE)
    return fake


@pytest.mark.usefixtures("study")
def test_run_prints_the_verdict_on_stdout_and_everything_else_on_stderr(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--space", "teacher.yaml"]) == 0

    out, err = capfd.readouterr()
    assert out.splitlines() == [
        r"the \x1b[1mverdict",
        "report: a run/report.html",
        "next: stability-search train --space 'a run/best.yaml' --steps 10000  # your own length",
    ]
    assert err.splitlines() == [
        "space file: teacher.yaml",
        f"12:00:00 study started, 2 search trials, 1 at a time, on cpu; files in {tmp_path}/a run",
    ]


@contextlib.contextmanager
def descriptor_1(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Let standard output be descriptor 1, as outside of pytest, and give what leads it to a path.

    Pytest's capture sets `sys.stdout` anew before each phase, so no fixture can do this.
    """
    kept, opened = os.dup(1), os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        with (
            open(1, "w", encoding="utf-8", closefd=False) as stream,
            monkeypatch.context() as patch,
        ):
            patch.setattr("sys.stdout", stream)
            yield lambda: os.dup2(opened, 1) and None
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(opened)


def test_the_verdict_reaches_stdout_while_descriptor_1_leads_to_a_log(
    study: FakeStudy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with descriptor_1("a.log", monkeypatch) as redirect:
        study.on_play = redirect
        assert main(["run", "--space", "teacher.yaml"]) == 0

    assert Path("a.log").read_text() == ""
    assert capfd.readouterr().out.startswith(r"the \x1b[1mverdict")


def test_run_hands_on_every_option(study: FakeStudy) -> None:
    words = ["run", "--space", "teacher.yaml", "--set", "trial.steps=50", "--set", "seed=7"]
    assert main([*words, "--output", "there", "--address", "head:6379"]) == 0

    [(name, call)] = study.calls
    assert (name, call["output"], call["address"]) == ("run", Path("there"), "head:6379")
    assert (call["space"].study.trial_steps, call["space"].study.seed) == (50, 7)
    assert call["command"].startswith("stability-search run --space teacher.yaml --set trial")


def test_json_events_leave_only_json_on_stdout(
    study: FakeStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--space", "teacher.yaml", "--json-events"]) == 0

    out, err = capfd.readouterr()
    [line] = [json.loads(line) for line in out.splitlines()]
    assert (line["event"], line["run_directory"]) == ("study_started", str(study.directory))
    assert r"the \x1b[1mverdict" in err.splitlines()


@pytest.mark.parametrize(
    ("kind", "code", "last"),
    [
        (VerdictKind.NONE, 3, f"next: {AGAIN}  # change it first, as the report says"),
        (VerdictKind.INCOMPLETE, 6, "next: stability-search resume 'a run'"),
    ],
)
def test_the_exit_code_and_the_next_command_follow_the_verdict(
    kind: VerdictKind, code: int, last: str, study: FakeStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    study.kind, study.exit_code = kind, code

    assert main(["resume", "a run", "--set", "search.trials=96"]) == code

    [(name, call)] = study.calls
    assert (name, call["run"], list(call["overrides"])) == (
        *("resume", Path("a run")),
        ["search.trials=96"],
    )
    assert capfd.readouterr().out.splitlines()[-1] == last


def test_report_exits_0_whatever_the_verdict(
    study: FakeStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    study.kind, study.exit_code = VerdictKind.NONE, 3

    assert main(["report", "a run"]) == 0

    assert study.calls == [("report", {"run": Path("a run")})]
    assert capfd.readouterr().out.startswith(r"the \x1b[1mverdict")


def test_a_dry_run_starts_nothing_and_refuses_to_make_events(
    study: FakeStudy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(
        "stability_search.cli.commands.print_dry_run", lambda _, **options: asked.append(options)
    )
    words = ["run", "--space", "teacher.yaml", "--dry-run", "--output", "there"]

    assert main(words) == 0
    assert main([*words, "--json-events"]) == 2

    assert asked == [{"output": Path("there"), "address": None}]
    assert study.calls == []
    assert "a dry run has no events" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InfrastructureError("12 of 40 attempts were lost.", hint="Run doctor."), 4),
        (UserCodeError("ValueError at task.py:3"), 5),
        (StoppedEarlyError("disk full"), 6),
        (TerminatedError("interrupted"), 143),
    ],
)
def test_an_error_of_ours_is_one_line_and_its_exit_code(
    error: StabilitySearchError, code: int, study: FakeStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    study.raises = error

    assert main(["run", "--space", "teacher.yaml"]) == code

    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == str(error)
    assert "Traceback" not in err


def test_any_other_error_is_a_bug_with_traceback_and_log(
    study: FakeStudy, capfd: pytest.CaptureFixture[str]
) -> None:
    study.raises = RuntimeError("boom \x1b[2J")

    assert main(["run", "--space", "teacher.yaml"]) == 1

    err = capfd.readouterr().err
    log = study.directory / "run.log"
    assert "Traceback (most recent call last):" in err
    assert r"RuntimeError: boom \x1b[2J" in err
    assert f"Log: {log}" in err
    assert err.splitlines()[-1].startswith("This is a bug in stability-search")
    assert "RuntimeError: boom" in log.read_text()


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_current_folder_that_is_gone_is_no_bug_and_a_file_that_is_missing_is_one(
    is_gone: bool,
    study: FakeStudy,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study.raises = FileNotFoundError(2, "No such file or directory")
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if is_gone:
        folder.rmdir()
    assert main(["run", "--space", "teacher.yaml"]) == (2 if is_gone else 1)
    err = capfd.readouterr().err
    told = "the current folder has been removed. Change into one that is there."
    assert (told in err, "Traceback" in err) == (is_gone, not is_gone)


def test_ctrl_c_outside_of_a_study_is_130(
    study: FakeStudy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: Path) -> object:
        raise KeyboardInterrupt(run)

    monkeypatch.setattr(sys.modules["stability_search.search.closing"], "render_run", interrupted)

    assert main(["report", str(study.directory)]) == 130
    assert capfd.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run"], "Missing option '--space'."),
        (["runn"], "No such command 'runn'."),
        (["run", "--space", "x", "--spce", "\x1b[2J"], "No such option"),
        (["diagnose"], "Missing option '--space'."),
        (["resume"], "Missing argument 'RUN'."),
    ],
)
def test_a_wrong_command_line_is_exit_2_in_one_line(
    words: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2

    out, err = capfd.readouterr()
    assert out == ""
    assert says in err
    assert "\x1b" not in err
    assert err.endswith("See `stability-search --help`.\n")


COMMANDS = [
    "run",
    "resume",
    "status",
    "report",
    "compare",
    "validate",
    "diagnose",
    "train",
    "instrument",
    "submit",
    "logs",
    "stop",
    "fetch",
    "schema",
    "doctor",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert capfd.readouterr().out.startswith(f"Usage: stability-search {command}")


def test_help_names_the_commands_and_no_others(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0

    text = capfd.readouterr().out.partition("Commands:")[2]
    names = [
        line.split()[0] for line in text.splitlines() if line.startswith("  ") and line[2] != " "
    ]
    assert names == COMMANDS


@pytest.mark.parametrize(
    ("file", "line"),
    [
        (
            "teacher.yaml",
            (
                "teacher.yaml: ok. 3 settings vary (1 conditional), 1 fixed; 48 trials of "
                "200 steps, then up to 3 ladders of 400 steps on 5 seeds"
            ),
        ),
        (
            "one.yaml",
            (
                "one.yaml: ok. 1 configuration, 2 fixed; no search, "
                "then 1 ladder of 400 steps on 1 seed"
            ),
        ),
    ],
)
@pytest.mark.usefixtures("study")
def test_validate_says_what_the_file_asks_for(
    file: str, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "--space", file]) == 0
    assert capfd.readouterr().out.splitlines()[0] == line


@pytest.mark.usefixtures("study")
def test_a_bad_space_file_is_exit_2_with_every_problem(
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = SPACE.replace("low: 1e-4", "low: -1").replace("batch_size: 2", "batch_siz: 2")
    Path("bad.yaml").write_text(text)

    assert main(["validate", "--space", "bad.yaml"]) == 2

    out, err = capfd.readouterr()
    assert out == ""
    assert "bad.yaml:4:" in err
    assert "bad.yaml:6:" in err
    assert err.splitlines()[-1] == "2 problems; nothing was started"


def test_schema_is_a_json_schema(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert "task" in json.loads(capfd.readouterr().out)["properties"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(
    ("words", "code"),
    [(["schema"], 6), (["report", "a run"], 6), (["run", "--space", "one.yaml"], 0)],
)
def test_a_full_disk_under_stdout_is_said(
    words: list[str],
    code: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with descriptor_1("/dev/full", monkeypatch) as redirect:
        redirect()
        assert main(words) == code

    assert capfd.readouterr().err.splitlines()[-1].endswith("written: No space left on device.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["train", "--space", "one.yaml", "--steps", "abc"],
            "'--steps': .*, but got 'abc'. See",
        ),
        (["status", "--format=xml", "run"], "but got 'xml'. See"),
        (["validate", "--space", "absent"], "^absent  no such space file: .*shipped"),
        (["validate", "--space", ""], "^''  no such space file: .*shipped"),
        (["run", "--space", "one.yaml", "--output", "one.yaml"], "cannot be made: .*Choose"),
    ],
)
@pytest.mark.usefixtures("study")
def test_a_wrong_value_is_said_with_rule_value_and_way_out(
    words: list[str],
    says: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stability_search import space_directory

    monkeypatch.setattr(
        sys.modules["stability_search.search.study"],
        "run_study",
        lambda _, *, output, **__: space_directory.make_folder(output),
    )
    assert main(words) == 2

    err = capfd.readouterr().err
    assert re.search(says, err, re.MULTILINE)
    assert "Traceback" not in err
    assert "^\n" not in err  # no caret under nothing


def test_no_words_at_all_are_answered_by_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "See `stability-search --help`" not in capfd.readouterr().err


CLOSED = """
import os, sys
os.close(1)
sys.stdout = None
from stability_search.cli.program import main
code = main(["--version"])
opened = os.open(os.devnull, os.O_RDONLY)
os.write(2, f"{code} {opened}".encode())
"""


def test_a_closed_standard_output_is_no_bug_and_no_file_takes_its_place() -> None:
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", CLOSED], capture_output=True, text=True, check=True
    )

    code, opened = map(int, done.stderr.split())
    assert code == 0
    assert opened > 2  # else prints would land in what is opened next


def test_a_reader_that_leaves_during_the_help_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(_words: object) -> int:
        raise SystemExit(1)  # what Typer makes of a broken pipe

    monkeypatch.setattr("stability_search.cli.program.parse", leave)
    assert main(["--help"]) == 0
