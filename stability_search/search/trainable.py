"""One worker process: trials one after the other, each reported to Ray Tune by time.

A trial's last two reports carry its step records as one Parquet blob and then its summary, so
that nothing of it goes through Ray step by step and only the driver writes files. A process is
used again only while it is as a fresh one would be; otherwise it reports its summary and then
gives itself up.
"""

import contextlib
import faulthandler
import json
import os
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ray import tune

from stability_search.records import Outcome, TrialSummary
from stability_search.search.process_state import process_state
from stability_search.search.request import Order

if TYPE_CHECKING:
    from stability_search.records import StepRecord
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


class DirtyProcessError(RuntimeError):
    """Raised by a worker whose process must not be used again, after its summary is out."""


class TrialTrainable(tune.Trainable):
    """Runs `run_trial` inside a reused actor.

    Its `config` holds `order` (a `TrialRequest` as text), `folder` and `import_path` (where
    relative paths and modules of the task are looked for), `num_threads` and `report_s`.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Load torch once, and take the first trial."""
        import torch

        torch.set_num_threads(config["num_threads"])
        with contextlib.suppress(FileNotFoundError):
            os.chdir(config["folder"])
        if config["import_path"] not in sys.path:
            sys.path.insert(0, config["import_path"])
        # The first optimizer of a process imports a second's worth of torch.
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        self._clean = process_state()
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self._order = Order.from_text(config["order"])
        self._report_s = float(config["report_s"])
        self._records: list[StepRecord] = []
        self._summary: TrialSummary | None = None
        self._trial: Generator[Progress, None, TrialSummary] | None = None
        self._must_end = False
        self._has_reported = False

    def step(self) -> dict[str, Any]:
        """Train until the next report is due, or hand over what the trial has become.

        The first report comes before anything can hang: it tells the driver which process to
        kill.
        """
        if self._must_end:
            raise DirtyProcessError("this process is given up; its trial was reported")
        if not self._has_reported:
            self._has_reported = True
            return _report("started", "")
        if self._summary is None:
            self._summary = self._train()
            if self._summary is None:
                return _report("progress", _progress_text(self._records[-1], self._num_bad()))
            return _report("steps", _encode(self._records))
        summary = self._summary
        is_clean = summary.outcome in _REUSABLE and process_state() == self._clean
        self._must_end = not is_clean
        text = json.dumps(summary.to_json(), allow_nan=False)
        return {**_report("summary", text), "done": is_clean}

    def _num_bad(self) -> int:
        return sum(record.label == "bad" for record in self._records)

    def _train(self) -> TrialSummary | None:
        from stability_search.trial import run_trial

        if self._trial is None:
            order = self._order
            # Needs no GIL, and leaves every thread's stack in the log.
            limit = order.config.timeout_s * order.allowance + WATCHDOG_GRACE_S
            faulthandler.dump_traceback_later(limit, exit=True)
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
            self._records.append(progress.record)
            if time.monotonic() >= due:
                return None

    def cleanup(self) -> None:
        """Disarm the watchdog."""
        faulthandler.cancel_dump_traceback_later()


def _report(kind: str, payload: str | bytes) -> dict[str, Any]:
    return {"kind": kind, "payload": payload}


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
