"""A worker of Ray Tune: trials one after the other, each reported by time."""

import faulthandler
import time
from typing import Any

from ray import tune

from stability_search.search.worker import Report, ReportKind, Worker, WorkerSettings

WARM = "warm"  # kind of the reports of a trial that has no order
_WARM_S = 0.1  # between the first two of them, then twice as long; the driver ends such a trial


class DirtyProcessError(RuntimeError):
    """Raised by a worker whose process must not be used again, after its summary is out."""


class TrialTrainable(tune.Trainable):
    """Runs a `Worker` inside a reused actor.

    Its `config` holds `worker` (the arguments of `WorkerSettings`) and `order` (a `TrialRequest`
    as text; empty to do nothing but be ready).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Load torch once, and take the first trial."""
        settings = WorkerSettings(**config["worker"])
        self._worker, self._longest_pause_s = Worker(settings), settings.report_s
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._is_warming, self._pause_s = not config["order"], 0.0
        if not self._is_warming:
            self._worker.take(config["order"])

    def step(self) -> dict[str, Any]:
        """Train until the next report is due, or hand over what the trial has become.

        A dirty process reports the end and then gives itself up: Tune asks for another report.
        """
        if self._is_warming:
            time.sleep(self._pause_s)
            # Each report costs the driver some ms, and a hundred workers may wait for the last.
            self._pause_s = min(max(2 * self._pause_s, _WARM_S), self._longest_pause_s)
            return {"kind": WARM}
        if not self._worker.is_clean:
            raise DirtyProcessError("this process is given up; its trial was reported")
        report = self._worker.next_report()
        is_done = report.kind is ReportKind.ENDED and self._worker.is_clean
        return {**_as_result(report), "done": is_done}

    def cleanup(self) -> None:
        """Disarm the watchdog."""
        faulthandler.cancel_dump_traceback_later()


def _as_result(report: Report) -> dict[str, Any]:
    return {"kind": report.kind.value, "payload": report.payload}
