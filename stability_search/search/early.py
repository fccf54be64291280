"""Workers of the driver's own, which train before Ray is there.

Ray needs several seconds to start, and its workers again. On a machine without a GPU a nursery of
the driver forks workers meanwhile. They run the same code as Ray's and report to the same desk.
Once Ray's workers are ready the early ones are retired, each after its trial.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from stability_search.search.desk import Desk, RunningTrial
from stability_search.search.remains import kill_group
from stability_search.search.worker import ReportKind, WorkerSettings
from stability_search.settings.study import Resources

_GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")  # NVIDIA, WSL, AMD
_POLL_S = 0.1  # signals are looked for so often


def is_surely_cpu(resources: Resources) -> bool:
    """Return True if trials will run on the CPU, without asking torch, which takes a second.

    Args:
        resources: What a trial occupies; `gpu` None takes a GPU where there is one.
    """
    if resources.gpu is not None or resources.accelerator is not None:
        return resources.gpu == 0 and resources.accelerator is None
    return sys.platform == "linux" and not any(Path(path).exists() for path in _GPU_DEVICES)


@dataclass(kw_only=True, slots=True)
class _EarlyWorker:
    connection: Connection
    pid: int = 0
    running: RunningTrial | None = None


class EarlyWorkers:
    """A nursery and its workers; close it.

    Args:
        num_slots: Trials at once.
        settings: What every worker is told.
        log: File that gets what they print.
    """

    def __init__(self, num_slots: int, settings: WorkerSettings, log: Path) -> None:
        """Start the nursery; it loads torch while the caller goes on."""
        self._settings = settings
        self._num_wanted = num_slots
        self._workers: list[_EarlyWorker] = []
        self._has_begun = False
        self._is_closed = False
        ours, theirs = socket.socketpair()
        module = "stability_search.search.nursery"
        words = [str(theirs.fileno()), json.dumps(asdict(settings))]
        with theirs, log.open("ab") as output:
            self._socket = ours
            self._nursery = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-P", "-m", module, *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(settings.num_threads),
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the driver
            )
        for _ in range(num_slots):
            self._fork()

    def _fork(self) -> None:
        """Ask the nursery for a worker; where it is gone there are fewer workers."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._socket, [b"w"], [theirs.fileno()])
            except OSError:
                ours.close()
                return
        self._workers.append(_EarlyWorker(connection=Connection(ours.detach())))

    # -- giving trials out -------------------------------------------------------------------

    def feed(self, desk: Desk) -> None:
        """Give trials to idle workers."""
        for worker in self._workers:
            if worker.running is None and not self._give_next(worker, desk):
                return

    def _give_next(self, worker: _EarlyWorker, desk: Desk) -> bool:
        running = desk.next_trial()
        if running is None:
            return False
        worker.running = running
        is_sent = False
        with contextlib.suppress(OSError):  # a worker that is gone is heard of by `turn`
            worker.connection.send(running.request.to_text())
            is_sent = True
        if worker.pid and is_sent:
            desk.begin(running, node=os.uname().nodename, pid=worker.pid)
        return True

    @property
    def num_workers(self) -> int:
        """How many slots they occupy."""
        return len(self._workers)

    @property
    def has_begun(self) -> bool:
        """True once a trial has begun; from then on they need no core to start."""
        return self._has_begun

    # -- hearing of them ---------------------------------------------------------------------

    def turn(self, desk: Desk, *, timeout_s: float = _POLL_S) -> None:
        """Take what has been reported, give out what comes next, and write down what ended.

        Args:
            desk: Where trials come from and reports go.
            timeout_s: Longest wait for a report.
        """
        ready = wait([worker.connection for worker in self._workers], timeout_s)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            self._hear(worker, desk)
        for running in desk.overdue():
            running.kill()
        self.feed(desk)
        desk.settle()

    def _hear(self, worker: _EarlyWorker, desk: Desk) -> None:
        running = worker.running
        try:
            kind, payload, pid, is_clean = worker.connection.recv()
        except (EOFError, OSError):
            self._drop(worker)
            if running is not None:
                _lose(running, desk)
            return
        if running is None:
            return
        if kind == ReportKind.STARTED:
            worker.pid = pid
            self._has_begun = True
            desk.begin(running, node=os.uname().nodename, pid=pid)
            return
        desk.hear(running, ReportKind(kind), payload)
        if kind == ReportKind.ENDED:
            worker.running = None
            if not is_clean or len(self._workers) > self._num_wanted:
                self._drop(worker)

    def _drop(self, worker: _EarlyWorker) -> None:
        """Let a worker go; its process ends by itself, and another takes its place."""
        worker.connection.close()
        self._workers.remove(worker)
        if len(self._workers) < self._num_wanted and worker.pid:
            self._fork()

    # -- ending ------------------------------------------------------------------------------

    def retire(self) -> None:
        """Take no further trials: each worker ends after the trial that it has."""
        self._num_wanted = 0
        for worker in list(self._workers):
            if worker.running is None:
                self._drop(worker)

    def close(self) -> None:
        """End all processes at once; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._num_wanted = 0
        for worker in self._workers:
            worker.connection.close()
            if worker.pid:
                kill_group(worker.pid)
        self._workers.clear()
        self._socket.close()
        kill_group(self._nursery.pid)
        self._nursery.wait()


def _lose(running: RunningTrial, desk: Desk) -> None:
    if running.started:
        desk.lose(running, "its worker died")
    else:  # no process has begun it: nothing is lost
        desk.hand_back(running)


def _environment(num_threads: int) -> dict[str, str]:
    """Let workers find the modules that this process finds, and pin their threads."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(num_threads),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
