"""What a study would be, before it is started."""

import os
import select
import sys
from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.errors import (
    InfrastructureError,
    StabilitySearchError,
    StoppedEarlyError,
    UsageError,
    UserCodeError,
)
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search import run_directory
from stability_search.search.dry_run import Outlook, look_ahead, refuse, time_first
from stability_search.search.timing import Timing, as_timing
from tests.search.inline_study import TINY, write_space


def outlook_of(folder: Path, *overrides: str, address: str | None = None) -> Outlook:
    space = spaces.load(write_space(folder), ("search.resources.gpu=0", *overrides))
    return look_ahead(space, output=folder / "out", address=address)


def ended(outcome: Outcome, **fields: str) -> Timing:
    end = TrialSummary(outcome=outcome, num_planned_steps=20, **fields)  # type: ignore[arg-type]
    return Timing(setup_s=0.0, probe_s=0.0, step_s=None, end=end)


def test_it_names_the_first_configurations_and_bounds_the_work(tmp_path: Path) -> None:
    outlook = outlook_of(tmp_path)

    assert [round(float(str(one["learning_rate"])), 6) for one in outlook.proposals[:1]] == [0.01]
    assert len(outlook.proposals) == 5
    assert outlook.first.config.engine.learning_rate == 0.01
    assert len(outlook.first.preflight) > 0
    assert outlook.num_trials == 7 + 6 + outlook.confirm.max_trials
    assert outlook.needed_bytes == run_directory.estimated_bytes(
        num_trials=outlook.num_trials, num_steps=outlook.num_steps
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml", "tiny_task.py"]


def test_it_says_what_would_go_to_a_cluster_and_what_would_stay_here(tmp_path: Path) -> None:
    path = write_space(tmp_path)
    task = path.with_name(TINY.name)
    task.write_text(f"import pack.net, local\n{task.read_text()}")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "net.py").touch()
    (tmp_path / "pack" / "data.bin").touch()
    (tmp_path / "local.py").touch()
    (tmp_path / ".gitignore").write_text("local.py")
    space = spaces.load(path, ("search.resources.gpu=0",))
    outlook = look_ahead(space, output=None, address="auto")
    assert outlook.uploaded == {
        "pack/data.bin": 0,
        "pack/net.py": 0,
        task.name: task.stat().st_size,
    }
    assert [note.partition(" (")[0] for note in outlook.notes] == [
        "imported, but not sent: local.py"
    ]
    here = look_ahead(space, output=None, address=None)
    assert (here.uploaded, here.notes) == ({}, ())
    os.truncate(tmp_path / "pack" / "data.bin", 2**40)  # a hole
    with pytest.raises(UsageError, match="at most 50 MiB of a task's files"):
        look_ahead(space, output=None, address="auto")


def test_the_time_is_that_of_all_trials_on_all_slots(tmp_path: Path) -> None:
    outlook = outlook_of(tmp_path, "search.max_concurrent=1")
    timing = Timing(setup_s=2.0, probe_s=0.25, step_s=0.5, end=None)

    seconds = outlook.seconds(timing)

    assert seconds is not None
    assert seconds[1] == outlook.num_trials * (2.0 + 10 * 0.25) + outlook.num_steps * 0.5
    confirm = outlook.confirm
    spared = confirm.max_trials - confirm.min_trials
    assert seconds[1] - seconds[0] == spared * (2.0 + 10 * 0.25 + 30 * 0.5)


@pytest.mark.parametrize(
    ("overrides", "address"),
    [((), "ray://head:10001"), (("search.resources.gpu=1",), None)],
    ids=["a cluster", "GPUs"],
)
def test_what_only_ray_knows_is_not_guessed(
    overrides: tuple[str, ...], address: str | None, tmp_path: Path
) -> None:
    outlook = outlook_of(tmp_path, *overrides, address=address)

    assert outlook.machine is None
    assert outlook.seconds(Timing(setup_s=1.0, probe_s=0.0, step_s=1.0, end=None)) is None


def test_what_run_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a trial needs 4096 CPU"):
        outlook_of(tmp_path, "search.resources.cpu=4096")

    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="out is no directory"):
        outlook_of(tmp_path)

    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    outlook_of(tmp_path)  # the twin: an empty directory will do
    (tmp_path / "out" / "space.yaml").write_text("")
    with pytest.raises(UsageError, match="a study is there already"):
        outlook_of(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written"):
        outlook_of(tmp_path)


@pytest.mark.parametrize(
    ("timing", "error", "says"),
    [
        (
            ended(
                Outcome.USER_ERROR, error_type="KeyError", error_place="t.py:3", error_text="tb"
            ),
            UserCodeError,
            r"failed with KeyError at t.py:3.\ntb",
        ),
        (
            ended(Outcome.USER_ERROR, error_type="UsageError", reason="clip_norm: no such thing"),
            UsageError,
            "clip_norm: no such thing",
        ),
        (
            ended(Outcome.INFRASTRUCTURE, reason="its process died: bye"),
            InfrastructureError,
            "first steps were lost: its process died: bye",
        ),
    ],
)
def test_what_the_first_steps_show_is_raised(
    timing: Timing, error: type[StabilitySearchError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        refuse(outlook_of(tmp_path), timing)


@pytest.mark.parametrize("outcome", [Outcome.DIVERGED, Outcome.TIMED_OUT, Outcome.OUT_OF_MEMORY])
def test_a_result_of_the_first_steps_refuses_nothing(outcome: Outcome, tmp_path: Path) -> None:
    outlook = outlook_of(tmp_path)
    if outlook.shortage is None:
        refuse(outlook, ended(outcome))


def test_a_step_is_the_median_and_reading_the_probe_what_the_second_took_longer() -> None:
    took = as_timing([8.0, 0.75, 0.5, 0.25, 4.0], None)

    assert (took.setup_s, took.probe_s, took.step_s) == (8.0, 0.25, 0.5)
    assert as_timing([8.0, 0.25, 0.5, 0.5, 0.5], None).probe_s == 0.0  # never negative
    short = as_timing([8.0, 0.75], ended(Outcome.DIVERGED).end)
    assert (short.setup_s, short.probe_s, short.step_s) == (8.0, 0.0, None)
    assert as_timing([], None).setup_s == 0.0


# -- the first steps, for real ----------------------------------------------------------------

HARM = """
import os, subprocess, sys, time
from {tiny} import Tiny as Base

class Tiny(Base):
    def loss(self, model, batch):
        {body}
        return super().loss(model, batch)
"""


def timing_of(folder: Path, body: str = "pass", *overrides: str) -> tuple[Outlook, Timing]:
    space_file = write_space(folder)
    (folder / "tiny_base.py").write_text(TINY.read_text())
    (folder / TINY.name).write_text(HARM.format(tiny="tiny_base", body=body))
    space = spaces.load(space_file, ("search.resources.gpu=0", *overrides))
    outlook = look_ahead(space, output=folder / "out", address=None)
    return outlook, time_first(space, outlook)


@pytest.mark.fault
def test_the_first_steps_are_timed_and_what_they_print_is_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    _, timing = timing_of(tmp_path, "print('loud'); time.sleep(0.05)")

    assert timing.end is None
    assert (timing.num_steps, timing.num_nonfinite) == (5, 0)
    assert timing.step_s is not None
    assert timing.step_s >= 0.05
    assert timing.setup_s >= 0.05  # the first step is part of it
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "out").exists()
    assert before == []


@pytest.mark.fault
@pytest.mark.parametrize(
    ("body", "overrides", "outcome", "says"),
    [
        ("raise KeyError('mine')", (), Outcome.USER_ERROR, "mine"),
        ("time.sleep(600)", ("trial.timeout_s=0.3",), Outcome.TIMED_OUT, "first steps took over"),
    ],
    ids=["raises", "hangs"],
)
def test_a_task_that_fails_in_them_is_named(
    body: str, overrides: tuple[str, ...], outcome: Outcome, says: str, tmp_path: Path
) -> None:
    _, timing = timing_of(tmp_path, body, *overrides)

    assert timing.step_s is None
    assert timing.end is not None
    assert timing.end.outcome is outcome
    assert says in timing.end.reason


@pytest.mark.fault
def test_a_loss_that_is_not_finite_in_them_is_counted(tmp_path: Path) -> None:
    body = "return super().loss(model, batch) * float('inf')"

    _, timing = timing_of(tmp_path, body)

    assert 0 < timing.num_nonfinite == timing.num_steps <= 5


@pytest.mark.fault
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_task_that_ends_its_process_is_named_and_what_it_started_is_ended(
    tmp_path: Path,
) -> None:
    os.mkfifo(tmp_path / "held")
    held = os.open(tmp_path / "held", os.O_RDONLY | os.O_NONBLOCK)
    words = (
        f"['sleep', '97'], stdout=open({str(tmp_path / 'held')!r}, 'w'), start_new_session=True"
    )
    body = f"subprocess.Popen({words}); print('last words', flush=True); os._exit(3)"

    _, timing = timing_of(tmp_path, body)

    assert timing.end is not None
    assert timing.end.outcome is Outcome.INFRASTRUCTURE
    assert timing.end.reason == "its process died: last words"
    # Once nobody holds the other end of the pipe, it has ended.
    waiting = select.poll()
    waiting.register(held)
    assert waiting.poll(60_000)[0][1] & select.POLLHUP
    os.close(held)


def test_the_shortage_is_raised_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: object, **__: object) -> None:
        raise StoppedEarlyError("disk: 1 MiB is free")

    monkeypatch.setattr(run_directory, "require_free_space", short)
    with pytest.raises(StoppedEarlyError, match="1 MiB is free"):
        refuse(outlook_of(tmp_path), ended(Outcome.DIVERGED))
