"""One tracker as the study sees it: a queue that takes everything at once and never fails.

A thread empties the queue into the tracker's process, one job after the other.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from stability_search.trackers.names import TrackerName

_LOG = "run.log"
_CLOSE_S = 10.0  # for a tool that failed to end what it has started
_END_S = 1.0  # for a killed process to be gone
# Of MLflow, where nobody set them: its own retries take minutes to find a server gone.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
Job = dict[str, Any]


class _SilentError(Exception):
    """The tracker has failed: nothing more is logged."""


class Feed:
    """Logs one study to one tool, behind a queue.

    Args:
        name: The tool.

    Attributes:
        problem: Why the tracker fell silent; empty while it has not.
    """

    def __init__(self, name: TrackerName) -> None:
        self.name = name
        self.problem = ""
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._process: subprocess.Popen[str] | None = None
        self._is_stopped = False
        self._is_left = False
        self._log = Path(os.devnull)
        self._num_added = 0
        self._num_done = 0

    @property
    def num_left(self) -> int:
        """How much is not logged yet: trials, and the end of the study."""
        return self._num_added - self._num_done

    def begin(self, directory: Path, study_id: str, names: Sequence[str]) -> None:
        """Start logging a study.

        Args:
            directory: Its run directory.
            study_id: What `run_files.study_id` returned.
            names: Trials that have finished already; those that are not logged yet will be.
        """
        self._log = directory / _LOG
        self._jobs.put({"directory": str(directory.absolute()), "study_id": study_id})
        for name in names:
            self.add({"do": "trial", "name": name, "q": None})
        self._thread.start()

    def add(self, job: Job) -> None:
        """Take something to log; returns at once."""
        self._num_added += 1
        self._jobs.put(job)

    def end(self) -> None:
        """Say that nothing more will come."""
        self._jobs.put(None)

    def is_done_within(self, seconds: float) -> bool:
        """Wait until all is logged, at most so long; True also where nothing ever began."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Log nothing more, but let the tool end what it holds open; returns at once."""
        self._is_stopped = True
        self._jobs.put(None)

    def leave(self) -> None:
        """End the tracker's process now, whatever it has not logged."""
        self._is_stopped = self._is_left = True
        self._kill()
        if self._thread.is_alive():
            self._thread.join(_END_S)  # it reads the end of the process's output

    def _work(self) -> None:
        try:
            with self._log.open("ab") as log:
                self._process = _start(self.name, log)
            self._log_all(self._process)
        except (_SilentError, OSError) as error:
            self._fail(str(error))
        except (ValueError, KeyError):  # half a line: it was killed while it wrote
            self._fail(f"its answer cannot be read; see {_LOG}")
        finally:
            if self._is_left:  # perhaps before there was a process to kill
                self._kill()
            if self._process is not None:
                _close(self._process)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_CLOSE_S)
            self._kill()

    def _fail(self, problem: str) -> None:
        if not self._is_stopped:
            self.problem = problem

    def _log_all(self, process: "subprocess.Popen[str]") -> None:
        logged = frozenset(self._ask(process, self._jobs.get())["logged"])
        while (job := self._jobs.get()) is not None:
            if job.get("name") not in logged:
                self._ask(process, job)
            self._num_done += 1
        _close(process)
        process.wait()

    def _ask(self, process: "subprocess.Popen[str]", job: Job | None) -> dict[str, Any]:
        if self._is_stopped or process.stdin is None or process.stdout is None:
            raise _SilentError("its process was ended")
        with contextlib.suppress(BrokenPipeError):  # it may have said why
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise _SilentError(f"its process ended; see {_LOG}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _SilentError(answer["error"])
        return answer

    def _kill(self) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)


def _close(process: "subprocess.Popen[str]") -> None:
    """Say that nothing more will come, and listen no longer."""
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what was not sent to a dead process
            if stream is not None:
                stream.close()


def _start(name: TrackerName, log: IO[bytes]) -> "subprocess.Popen[str]":
    return subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-P", "-m", "stability_search.trackers.process", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        env={**_DEFAULTS, **os.environ},
        process_group=0,  # Ctrl-C is for the study
    )
