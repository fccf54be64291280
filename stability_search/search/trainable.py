"""A worker of Ray Tune: trials one after the other, each reported by time."""

import faulthandler
import time
from typing import Any

from ray import tune

from stability_search.search.worker import Report, ReportKind, Worker, WorkerSettings

WARM = "warm"  # kind of the reports of a worker that has no order
_WARM_S = 0.1  # between the first two of them, then twice as long; the driver ends that
_LONGEST_WARM_S = 4.0  # a trial that comes then waits for so long


class DirtyProcessError(RuntimeError):
    """Raised by a worker whose process must not be used again, after its summary is out."""


class TrialTrainable(tune.Trainable):
    """Runs a `Worker` inside a reused actor.

    Its `config` holds `worker` (the arguments of `WorkerSettings`) and `order` (a `TrialRequest`
    as text; empty to be ready, and to run what `offer` brings).
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Load torch once, and take the first trial."""
        settings = WorkerSettings(**config["worker"])
        self._worker = Worker(settings)
        self._longest_pause_s = min(settings.report_s, _LONGEST_WARM_S)
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._order: str = config["order"]
        self._stays = not self._order
        self._wait()

    def _wait(self) -> None:
        self._is_waiting, self._pause_s = True, 0.0

    def offer(self, order: str) -> None:
        """Take a trial while it waits for one; it waits again afterwards."""
        self._order = order

    def step(self) -> dict[str, Any]:
        """Train until the next report is due, or hand over what the trial has become.

        A dirty process reports the end and then gives itself up: Tune asks for another report.
        """
        if self._order:
            order, self._order, self._is_waiting = self._order, "", False
            self._worker.take(order)
        if self._is_waiting:
            time.sleep(self._pause_s)
            # Each report costs the driver some ms, and a hundred workers may wait for the last.
            self._pause_s = min(max(2 * self._pause_s, _WARM_S), self._longest_pause_s)
            return {"kind": WARM}
        if not self._worker.is_clean:
            raise DirtyProcessError("this process is given up; its trial was reported")
        report = self._worker.next_report()
        is_free = report.kind is ReportKind.ENDED and self._worker.is_clean
        if is_free and self._stays:
            self._wait()
        return {**_as_result(report), "done": is_free and not self._stays}

    def cleanup(self) -> None:
        """Disarm the watchdog."""
        faulthandler.cancel_dump_traceback_later()


def _as_result(report: Report) -> dict[str, Any]:
    return {"kind": report.kind.value, "payload": report.payload}
