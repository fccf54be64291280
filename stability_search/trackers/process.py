"""The process of one tracker: it reads what to log, a JSON line each, and answers each with one.

A process of its own, because a tool may hang, print, start processes and threads, set variables
and wait at exit for a server that is gone; none of that reaches the study.

    python -m stability_search.trackers.process NAME
"""

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from stability_search.trackers.base import Tracker
from stability_search.trackers.names import TrackerName
from stability_search.trackers.run_files import RunFiles

_LINGER_S = 10.0  # after the study's own process is gone
_MAX_REASON = 300


def new_tracker(name: TrackerName) -> Tracker:
    """Load one tool."""
    match name:
        case TrackerName.TENSORBOARD:
            from stability_search.trackers.tensorboard import TensorBoardTracker

            return TensorBoardTracker()
        case TrackerName.MLFLOW:
            from stability_search.trackers.mlflow import MlflowTracker

            return MlflowTracker()
        case TrackerName.WANDB:
            from stability_search.trackers.wandb import WandbTracker

            return WandbTracker()


def serve(
    make: Callable[[], Tracker], lines: Iterator[str], answer: Callable[[dict[str, Any]], None]
) -> None:
    """Log what the lines say, up to the first error.

    Args:
        make: Loads the tool.
        lines: `begin`, then any number of `trial`, then `finish`; they just end where the study
            was stopped.
        answer: Is called once a line: `logged` after `begin`, `error` where something failed.
    """
    tracker: Tracker | None = None
    is_finished = False
    try:
        for line in lines:
            job = json.loads(line)
            if tracker is None:
                files = RunFiles(Path(job["directory"]))
                tracker = make()
                answer({"logged": sorted(tracker.begin(files.study(job["study_id"])))})
            elif job["do"] == "trial":
                tracker.add_trial(files.trial(job["name"], job["q"]))
                answer({})
            else:
                tracker.finish(files.end(job["verdict"], job["exit_code"]))
                is_finished = True
                answer({})
        if tracker is not None and not is_finished:
            tracker.stop()
    except Exception as error:  # noqa: BLE001 - a tool may raise anything; the study hears of it
        answer({"error": _reason(error)})
    finally:
        if tracker is not None:
            tracker.close()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:_MAX_REASON]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _lines_of(stream: TextIO) -> Iterator[str]:
    """Yield lines; where no more come the process ends soon, whatever a tool is waiting for."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)
        timer = threading.Timer(_LINGER_S, os._exit, [1])
        timer.daemon = True
        timer.start()

    threading.Thread(target=read, daemon=True).start()
    while (line := lines.get()) is not None:
        yield line


def main() -> None:
    """Serve over standard input and output; what a tool prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(said: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # the study is gone: nobody listens
            out.write(json.dumps(said) + "\n")
            out.flush()

    name = TrackerName(sys.argv[1])
    serve(lambda: new_tracker(name), _lines_of(sys.stdin), answer)
    sys.stdout.flush()
    os._exit(0)  # a thread still reads the input, and a tool's own threads may wait for a server


if __name__ == "__main__":
    main()
