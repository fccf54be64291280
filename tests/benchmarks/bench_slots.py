"""How much of the slots' time is spent in training: 64 trials of about 1 s.

    python -m tests.benchmarks.bench_slots

Counted from the start of the command to the end of the last of 7 pilot and 57 search trials, so
that starting Python, Ray and the workers is part of it.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from stability_search import read_run

SPACE = """\
task: {task}:Busy
trial: {{steps: 100}}
space: {{learning_rate: {{loguniform: {{low: 1e-4, high: 1e-2}}}}}}
search: {{trials: 57}}
confirm: {{top: 1, seeds: 1, steps: 100, octaves: 0, min_margin: 0}}
"""


def main() -> None:
    """Run the study and print its share."""
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder) / "busy.yaml"
        task = Path(__file__).with_name("busy_task.py")
        space.write_text(SPACE.format(task=task))
        started = time.time()
        command = [sys.executable, "-m", "stability_search", "run", "--space", str(space)]
        output = Path(folder) / "out"
        finished = subprocess.run(  # noqa: S603 - our own command
            [*command, "--output", str(output)], check=False, capture_output=True, text=True
        )
        if finished.returncode not in {0, 3}:
            sys.exit(finished.stderr)
        trials = read_run(output).trials
    timed = trials[trials["stage"] != "confirm"]
    begun = pd.to_datetime(timed["started_at"]).map(lambda stamp: stamp.timestamp())
    elapsed_s = float((begun + timed["wall_s"]).max()) - started
    num_slots = len(os.sched_getaffinity(0))
    share = float(timed["train_s"].sum()) / (num_slots * elapsed_s)
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {num_slots} slots, "
        f"Python {platform.python_version()}: {len(timed)} trials of "
        f"{timed['train_s'].mean():.2f} s in {elapsed_s:.1f} s; first trial after "
        f"{float(begun.min()) - started:.1f} s; share of slot time spent training {share:.2f}"
    )


if __name__ == "__main__":
    main()
