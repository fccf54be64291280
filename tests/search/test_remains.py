"""A killed worker's children end with it, and what has fled is found by its mark."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stability_search.search import remains
from stability_search.search.remains import MARK, ended_at_last, kill_group, kill_marked, new_mark

pytestmark = [
    pytest.mark.fault,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

LEADER = """\
import subprocess, sys
from stability_search.search.remains import lead_group
lead_group()
away = subprocess.DEVNULL
child = subprocess.Popen(["/bin/sleep", "60"], stdout=away)
fled = subprocess.Popen(["/bin/sleep", "60"], stdout=away, start_new_session=True)
print(child.pid, fled.pid, flush=True)
child.wait()
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    mark = new_mark()
    monkeypatch.setenv(MARK, mark)
    yield mark
    kill_marked(mark)


def start_leader() -> tuple["subprocess.Popen[str]", int, int]:
    leader = subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    child, fled = map(int, leader.stdout.readline().split())
    for pid in (child, fled):  # just begun, a process shows no environment yet
        assert soon(lambda pid=pid: bool(Path(f"/proc/{pid}/environ").read_bytes()))
    return leader, child, fled


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize("pid", [0, 1, -1])
def test_no_process_is_killed_that_is_not_ours_to_kill(
    pid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, lambda *_: pytest.fail("killed"))
    with pytest.raises(
        ValueError, match=f"a process that we started must be given, but got {pid}"
    ):
        kill_group(pid)


def soon(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_a_group_is_killed_even_where_its_leader_is_gone(mark: str) -> None:
    leader, child, fled = start_leader()
    leader.kill()
    leader.communicate()
    assert is_running(child)
    kill_group(leader.pid)
    assert soon(lambda: not is_running(child))
    assert is_running(fled)  # by `setsid`; its mark gives it away
    assert kill_marked(mark) == 1
    assert soon(lambda: not is_running(fled))


def test_a_leader_is_killed_with_its_group(mark: str) -> None:
    leader, child, _ = start_leader()
    kill_group(leader.pid)
    leader.communicate()
    assert leader.returncode == -signal.SIGKILL
    assert soon(lambda: not is_running(child))
    assert mark


def test_only_what_is_marked_and_no_child_of_ours_is_killed(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = subprocess.Popen(["/bin/sleep", "60"])
    other = new_mark()
    monkeypatch.setenv(MARK, other)
    leader, child, fled = start_leader()
    leader.kill()
    leader.communicate()
    assert kill_marked(mark) == 0
    assert all(map(is_running, (own.pid, child, fled)))
    assert kill_marked(other) == 2
    own.kill()
    own.wait()


def test_at_the_end_nothing_is_left_that_was_started_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(MARK, "of a study around this one")
    with ended_at_last():
        leader, child, fled = start_leader()
        leader.kill()
        leader.communicate()
        assert is_running(child)
    assert soon(lambda: not is_running(child) and not is_running(fled))
    assert os.environ[MARK] == "of a study around this one"


def test_a_process_that_is_gone_is_no_error() -> None:
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    kill_group(child.pid)
    assert not remains._descends_from(child.pid, os.getpid())  # noqa: SLF001
