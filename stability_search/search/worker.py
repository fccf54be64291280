"""One worker process: trials one after the other, whoever hands them out.

A trial's last report carries its step records as one Parquet blob beside its summary, so that
only the driver writes files and nothing travels step by step. A process is used again only while
it is as a fresh one would be. Nothing here knows Ray.
"""

import contextlib
import faulthandler
import json
import os
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search.process_state import CleanProcess
from stability_search.search.remains import lead_group
from stability_search.search.request import Order
from stability_search.search.shipping import travelled
from stability_search.settings.trial import TrialConfig

if TYPE_CHECKING:
    from stability_search.records.step import StepRecord
    from stability_search.trial import Progress

WATCHDOG_GRACE_S = 5.0  # after the clock between steps, before the driver's own kill

_REUSABLE = {
    Outcome.COMPLETED,
    Outcome.PRUNED,
    Outcome.DIVERGED,
    Outcome.SCALE_COLLAPSE,
    Outcome.NONFINITE_PARAMETERS,
    Outcome.TIMED_OUT,
}


class ReportKind(StrEnum):
    """What a worker reports.

    STARTED comes once in a process, with its first trial and before anything can hang: the
    payload is empty, the process is what the driver must know. PROGRESS carries JSON text, ENDED
    the summary as JSON text and the step records as a Parquet blob.
    """

    STARTED = "started"
    PROGRESS = "progress"
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One report of a worker.

    Attributes:
        kind: What it is about.
        payload: As `ReportKind` says.
    """

    kind: ReportKind
    payload: str | tuple[str, bytes] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What every worker of a study is told once.

    Attributes:
        folder: Where relative paths of the task start from.
        import_path: Where modules of the task are looked for as well.
        cargo: Name of the folder in which the task's files have come to this node; empty where
            they are where they always were.
        cargo_from: What it is a copy of, on the driver's machine.
        num_threads: Threads of torch, >= 1.
        report_s: Seconds between two reports of a trial, > 0.
        gpu_memory_fraction: Share of a GPU's memory that the process may take, in (0, 1]; None
            where it has a GPU of its own, or none.
    """

    folder: str
    import_path: str
    num_threads: int
    report_s: float
    gpu_memory_fraction: float | None = None
    cargo: str = ""
    cargo_from: str = ""


def load_torch() -> None:
    """Import what every trial needs, once in a process; the first optimizer needs most of it."""
    import torch

    import stability_search.step_files
    import stability_search.trial  # noqa: F401 - loaded ahead

    # Each class wraps its `step` when it is first used, which is no trial's doing.
    for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        optimizer([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unloaded:
    """Where the task's files are on this node, and where they came from."""

    root: str
    origin: str

    def here(self, order: str) -> str:
        """Return an order with the task's file where it is here."""
        data = json.loads(order)
        for config in (data["config"], *data["preflight"]):
            if config["task"]["file"]:
                config["task"]["file"] = str(Path(self.root, Path(config["task"]["file"]).name))
        return json.dumps(data)

    def there(self, text: str) -> str:
        """Return JSON text in which every path is as on the driver's machine."""
        return text.replace(json.dumps(self.root)[1:-1], json.dumps(self.origin)[1:-1])


def _unloaded(settings: WorkerSettings) -> _Unloaded:
    root = travelled(settings.cargo)
    if root is None:
        raise FileNotFoundError(f"the task's files have not come to this node: {settings.cargo}")
    return _Unloaded(root=str(root), origin=settings.cargo_from)


class Worker:
    """Runs `run_trial` again and again in one process.

    Args:
        settings: What holds for all trials.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        import torch

        lead_group()  # what the task starts can be killed with it
        load_torch()
        torch.set_num_threads(settings.num_threads)
        with contextlib.suppress(OSError):  # another machine may not have it
            os.chdir(settings.folder)
        self._cargo = _unloaded(settings) if settings.cargo else None
        import_path = self._cargo.root if self._cargo else settings.import_path
        if sys.path[:1] != [import_path]:
            sys.path.insert(0, import_path)
        if settings.gpu_memory_fraction is not None and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(settings.gpu_memory_fraction)
        self._report_s = settings.report_s
        self._clean: CleanProcess | None = None
        self._is_known = False
        self.is_clean = True

    def take(self, order: str) -> None:
        """Take the next trial.

        Args:
            order: What `TrialRequest.to_text` wrote.
        """
        self._order = Order.from_text(self._cargo.here(order) if self._cargo else order)
        self._records: list[StepRecord] = []
        self._trial: Generator[Progress, None, TrialSummary] | None = None

    def next_report(self) -> Report:
        """Train until the next report is due, or the trial has ended.

        After the report `ENDED`, `is_clean` says whether the process may be used again.
        """
        if not self._is_known:
            self._is_known = True
            return Report(kind=ReportKind.STARTED)
        summary = self._train()
        if summary is None:
            text = _progress_text(self._records[-1], self._num_bad())
            return Report(kind=ReportKind.PROGRESS, payload=text)
        steps = _encode(self._records)
        self._judge((summary.control or summary).outcome)
        text = json.dumps(summary.to_json(), allow_nan=False)
        text = self._cargo.there(text) if self._cargo else text
        return Report(kind=ReportKind.ENDED, payload=(text, steps))

    def _judge(self, outcome: Outcome) -> None:
        assert self._clean is not None  # noqa: S101 - for ourselves: a trial has run
        changes = self._clean.changes()
        self.is_clean = outcome in _REUSABLE and not changes
        if changes:
            sys.stdout.write(f"worker {os.getpid()} ends; changed: {', '.join(changes)}\n")
            self._clean.end_children()

    def _num_bad(self) -> int:
        return sum(record.label == "bad" for record in self._records)

    def _train(self) -> TrialSummary | None:
        from stability_search.trial import run_trial

        if self._trial is None:
            order = self._order
            # Needs no GIL, and leaves every thread's stack in the log.
            limit = order.config.timeout_s * order.allowance + WATCHDOG_GRACE_S
            faulthandler.dump_traceback_later(limit, exit=True)
            if self._clean is None:
                self._clean = _clean_process(order.config)
            self._trial = run_trial(
                order.config, constants=order.constants, preflight=order.preflight
            )
        due = time.monotonic() + self._report_s
        while True:
            try:
                progress = next(self._trial)
            except StopIteration as end:
                faulthandler.cancel_dump_traceback_later()
                summary: TrialSummary = end.value
                return summary
            if not progress.is_control:  # the trial's steps end with the kill
                self._records.append(progress.record)
            if time.monotonic() >= due:
                return None


def _clean_process(config: TrialConfig) -> CleanProcess:
    """Note how the process is before its first trial, but with the task's file imported."""
    from stability_search.tasks.loading import load_task

    with contextlib.suppress(Exception, SystemExit):  # the trial gives an error its name
        load_task(config.task, config.task_args)
    return CleanProcess()


def _progress_text(record: "StepRecord", num_bad_steps: int) -> str:
    return json.dumps(
        {
            "step": record.step,
            "num_bad_steps": num_bad_steps,
            "scale": record.scale,
            "grad_norm": record.grad_norm,
            "loss": record.loss,
        },
        allow_nan=False,
    )


def _encode(records: "list[StepRecord]") -> bytes:
    from stability_search.step_files import encode_steps

    return encode_steps(records)
