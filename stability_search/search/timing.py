"""How long the first steps of one configuration take, measured in a process of their own.

    python -m stability_search.search.timing FD SETTINGS PARENT

The process trains as a worker would and is ended with all that it started: whatever a task does
there, nothing of it stays.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, BinaryIO

from stability_search.interruption import end_with_parent
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search.remains import ended_at_last, kill_group
from stability_search.search.request import TrialRequest
from stability_search.search.worker import Worker, WorkerSettings
from stability_search.settings.trial import TrialConstants

if TYPE_CHECKING:
    from stability_search.trial import Progress

NUM_TIMED = 3
_NUM_BEFORE = 2  # the first steps of a process are slower; the second reads the probe once more
_START_S = 60.0  # to load Python and torch on a busy machine, which is no trial's time
_TIMED_OUT = "Timeout ("  # how faulthandler begins to tell that time was up
_LAST_WORDS = 300  # characters of what a dying process printed


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What the first steps took.

    Attributes:
        setup_s: Building task and model, reading the probe once, and the first step.
        probe_s: Reading the probe once.
        step_s: One step, the median of three; None where the trial did not get that far.
        end: How the trial ended before; None if it did not.
        num_steps: Steps that were made, those before the timed ones included.
        num_nonfinite: So many of them had a loss that was infinite or NaN.
    """

    setup_s: float
    probe_s: float
    step_s: float | None
    end: TrialSummary | None
    num_steps: int = 0
    num_nonfinite: int = 0


def time_steps(request: TrialRequest, settings: WorkerSettings) -> Timing:
    """Train the first steps of a trial and time them.

    Args:
        request: The trial; the configurations of its `preflight` are tried for one step first.
        settings: As for a worker.

    Returns:
        What they took. A trial that ends at once is told by `end`: `user_error` where the task
        fails, `infrastructure` where it takes its process with it, `timed_out` where the first
        steps take longer than the whole trial may.
    """
    with (
        tempfile.TemporaryFile() as order,
        tempfile.TemporaryFile() as result,
        tempfile.TemporaryFile() as output,
        ended_at_last(),
    ):
        order.write(request.to_text().encode())
        order.seek(0)
        words = [str(result.fileno()), json.dumps(asdict(settings)), str(os.getpid())]
        process = subprocess.Popen(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", "stability_search.search.timing", *words],
            stdin=order,
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(settings.num_threads),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            },
            pass_fds=[result.fileno()],
            process_group=0,  # Ctrl-C is for the command, which ends it
        )
        limit_s = request.config.timeout_s * request.allowance
        try:
            process.wait(limit_s + _START_S)
        except subprocess.TimeoutExpired:  # its own watchdog failed, or torch does not load
            output.write(_TIMED_OUT.encode())
        finally:
            kill_group(process.pid)
            process.wait()
        return _read(result) or _lost(request, output, limit_s)


def _lost(request: TrialRequest, output: BinaryIO, limit_s: float) -> Timing:
    """Say what became of a process that left no result."""
    output.seek(0)
    lines = output.read().decode(errors="backslashreplace").strip().splitlines()
    last = lines[-1][-_LAST_WORDS:] if lines else "it said nothing"
    outcome, reason = Outcome.INFRASTRUCTURE, f"its process died: {last}"
    if any(line.startswith(_TIMED_OUT) for line in lines):
        outcome, reason = Outcome.TIMED_OUT, f"its first steps took over {limit_s:g} s"
    planned = request.config.num_planned_steps
    end = TrialSummary(outcome=outcome, reason=reason, num_planned_steps=planned)
    return Timing(setup_s=0.0, probe_s=0.0, step_s=None, end=end)


def _read(result: BinaryIO) -> Timing | None:
    result.seek(0)
    try:
        data: dict[str, Any] = json.loads(result.read())
    except ValueError:
        return None
    end = data["end"]
    return Timing(**{**data, "end": None if end is None else TrialSummary.from_json(end)})


# -- in the process ---------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    """Time the trial whose order is on standard input.

    Args:
        arguments: Descriptor for the result, `WorkerSettings` as JSON text, and the process id of
            the command.
    """
    end_with_parent(int(arguments[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    order = sys.stdin.read()
    Worker(WorkerSettings(**json.loads(arguments[1])))  # the process is as a worker's from now on
    timing = _timed(order)
    text = json.dumps({**asdict(timing), "end": timing.end and timing.end.to_json()})
    os.write(int(arguments[0]), text.encode())
    sys.stdout.flush()
    os._exit(0)  # a thread of the task must not keep it


def _timed(text: str) -> Timing:
    from stability_search.search.request import Order
    from stability_search.trial import run_trial

    order = Order.from_text(text)
    limit_s = order.config.timeout_s * order.allowance
    faulthandler.dump_traceback_later(limit_s, exit=True)  # needs no GIL
    constants = TrialConstants(probe_steps=(0, 1))
    first = run_trial(order.config, constants=constants, preflight=order.preflight)
    _, end, _ = _laps(first, 1)
    if end is not None and end.num_steps == 0:
        return Timing(setup_s=0.0, probe_s=0.0, step_s=None, end=end)
    trial = run_trial(order.config, constants=constants)
    return as_timing(*_laps(trial, _NUM_BEFORE + NUM_TIMED))


def as_timing(laps: Sequence[float], end: TrialSummary | None, num_nonfinite: int = 0) -> Timing:
    """Say what the first steps took.

    Args:
        laps: Seconds of each, from the first: of two that are slower, and of three that are timed.
        end: How the trial ended before the last of them; None if it did not.
        num_nonfinite: Of the steps, those whose loss was infinite or NaN.
    """
    timed = laps[_NUM_BEFORE:]
    step_s = median(timed) if timed else None
    return Timing(
        setup_s=laps[0] if laps else 0.0,
        probe_s=max(0.0, laps[1] - step_s) if step_s is not None else 0.0,
        step_s=step_s,
        end=end,
        num_steps=len(laps),
        num_nonfinite=num_nonfinite,
    )


def _laps(
    trial: "Generator[Progress, None, TrialSummary]", count: int
) -> tuple[list[float], TrialSummary | None, int]:
    """Return the seconds of the first steps, how the trial ended if it did, and bad losses."""
    laps, num_nonfinite = [], 0
    try:
        for _ in range(count):
            began = time.perf_counter()
            record = next(trial).record
            laps.append(time.perf_counter() - began)
            num_nonfinite += record.loss is None
    except StopIteration as end:
        summary: TrialSummary = end.value
        return laps, summary, num_nonfinite
    trial.close()
    return laps, None, num_nonfinite


if __name__ == "__main__":
    main(sys.argv[1:])
