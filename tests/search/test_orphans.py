"""A process whose parent died before it could ask to end with it ends all the same, at once."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from stability_search.cluster import attempt
from stability_search.errors import InfrastructureError
from stability_search.interruption import has_hung_up
from stability_search.records.trial import Outcome, Stage
from stability_search.search import nursery, ray_host, timing
from stability_search.search.request import TrialRequest
from stability_search.search.worker import WorkerSettings
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import TaskReference, TrialConfig, TrialConstants

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = WorkerSettings(folder=".", import_path=str(ROOT), num_threads=1, report_s=60.0)
ENDS_WITH = "import sys; from stability_search.interruption import end_with_parent as end; "
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process so")

Pair = tuple[socket.socket, str]


class GoesOnError(Exception):
    """The process has gone on to its work."""


def go_on(*_: object) -> None:
    raise GoesOnError("to its work")


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Return a driver's end, and the descriptor of the other one, which is closed here."""
    driver, theirs = socket.socketpair()
    taken_over = SimpleNamespace(socket=lambda fileno: theirs, recv_fds=socket.recv_fds)  # noqa: ARG005 - as it is called
    for module in (nursery, ray_host):
        monkeypatch.setattr(module, "socket", taken_over)
    with driver, theirs:
        yield driver, str(theirs.fileno())


@pytest.fixture(autouse=True)
def _signals_and_life_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    for module in (nursery, ray_host):
        monkeypatch.setattr(module, "end_with_parent", lambda *_: None)


@pytest.mark.parametrize("sent", [b"", b"not read yet"])
def test_a_connection_tells_that_its_other_end_is_closed(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.send(sent)
        assert not has_hung_up(ours)
        theirs.close()
        assert has_hung_up(ours)


def test_no_ray_is_started_for_a_driver_that_is_gone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, descriptor = pair
    monkeypatch.setattr(ray_host, "ensure_private_token", go_on)
    driver.close()
    ray_host.main([descriptor, "{}"])


def test_a_ray_is_started_for_a_driver_that_lives(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_host, "ensure_private_token", go_on)
    with pytest.raises(GoesOnError, match="to its work"):
        ray_host.main([pair[1], "{}"])


def test_a_nursery_loads_nothing_for_a_driver_that_is_gone_whatever_it_asked_for(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, descriptor = pair
    monkeypatch.setattr(nursery, "load_torch", go_on)
    driver.send(b"w")
    driver.close()
    nursery.main([descriptor, json.dumps(asdict(SETTINGS))])


def test_a_nursery_loads_torch_for_a_driver_that_lives(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "load_torch", go_on)
    with pytest.raises(GoesOnError, match="to its work"):
        nursery.main([pair[1], json.dumps(asdict(SETTINGS))])


def test_a_worker_knows_its_nursery_from_before_it_was_forked(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, descriptor = pair
    before = os.getpid()
    parents: list[int] = []

    def fork() -> int:
        monkeypatch.setattr(os, "getpid", lambda: before + 1)
        return 0

    def end_with_parent(parent: int | None = None) -> None:
        if parent is not None:
            parents.append(parent)
            raise GoesOnError("to its work")

    monkeypatch.setattr(nursery, "end_with_parent", end_with_parent)
    monkeypatch.setattr(nursery, "load_torch", lambda: None)
    monkeypatch.setattr(os, "fork", fork)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(driver, [b"w"], [theirs.fileno()])
        with pytest.raises(GoesOnError, match="to its work"):
            nursery.main([descriptor, json.dumps(asdict(SETTINGS))])
    assert parents == [before]


@ON_LINUX
@pytest.mark.parametrize(("offset", "code"), [(0, 0), (1, -signal.SIGKILL)])
def test_a_process_whose_parent_is_another_by_now_ends(offset: int, code: int) -> None:
    parent = str(os.getpid() + offset)
    ended = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", f"{ENDS_WITH} end(int(sys.argv[1]))", parent],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ended.returncode == code


@ON_LINUX
@pytest.mark.parametrize(("offset", "code"), [(0, 0), (1, InfrastructureError.exit_code)])
def test_a_study_of_an_attempt_that_is_gone_does_not_begin(
    offset: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.getpid() + offset
    monkeypatch.setattr(attempt.os, "getpid", lambda: pid)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert attempt._run(["--version"], folder=tmp_path)[0] == code  # noqa: SLF001


@ON_LINUX
def test_no_steps_are_timed_for_a_command_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.getpid() + 1
    monkeypatch.setattr(timing.os, "getpid", lambda: pid)
    monkeypatch.setattr(timing, "ended_at_last", contextlib.nullcontext)
    config = TrialConfig(
        task=TaskReference(file=str(tmp_path / "none.py"), class_name="None_"),
        engine=EngineSettings(learning_rate=0.1, num_planned_steps=3),
        num_planned_steps=3,
        timeout_s=60,
    )
    request = TrialRequest(
        trial_id="pilot-00",
        stage=Stage.PILOT,
        index=0,
        config_id="c",
        settings={},
        config=config,
        constants=TrialConstants(probe_steps=(0, 3)),
    )
    end = timing.time_steps(request, SETTINGS).end
    assert end is not None
    assert (end.outcome, end.reason) == (
        Outcome.INFRASTRUCTURE,
        "its process died: it said nothing",
    )
