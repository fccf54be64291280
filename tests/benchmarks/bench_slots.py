"""How much of the slots' time is spent in training: 64 search trials of about 1 s.

    python -m tests.benchmarks.bench_slots [--ours-only]

Counted from the start of the command to the end of the last of 7 pilot and 64 search trials, so
that starting Python, Ray and the workers is part of it. Beside it plain Ray Tune with function
trainables, which report at every step, and with class trainables that are not reused; both
train the same model on the same batches, in fewer trials because they are slow, and are counted
in the same way.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from stability_search import read_run

STEPS = 100
NUM_RIVAL_TRIALS = 16
SPACE = """\
task: {task}:Busy
trial: {{steps: 100}}
space: {{learning_rate: {{loguniform: {{low: 1e-4, high: 1e-2}}}}}}
search: {{trials: 64}}
confirm: {{top: 1, seeds: 1, steps: 100, octaves: 0, min_margin: 0}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one method took.

    Attributes:
        num_trials: Trials that were counted.
        train_s: Seconds in training steps, of all of them.
        first_s: Seconds from the start of the command to the first trial.
        elapsed_s: Seconds from the start of the command to the last trial's end.
    """

    num_trials: int
    train_s: float
    first_s: float
    elapsed_s: float

    def as_text(self, num_slots: int) -> str:
        """Return one line of text."""
        share = self.train_s / (num_slots * self.elapsed_s)
        return (
            f"{self.num_trials} trials of {self.train_s / self.num_trials:.2f} s in "
            f"{self.elapsed_s:.1f} s; first trial after {self.first_s:.1f} s; "
            f"share of slot time spent training {share:.2f}"
        )


def main() -> None:
    """Run our study and its rivals, and print their shares."""
    if len(sys.argv) == 4:
        run_rival(sys.argv[2], Path(sys.argv[3]))
        return
    num_slots = len(os.sched_getaffinity(0))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {num_slots} slots, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} before"
    )
    print(f"ours: {measure_ours().as_text(num_slots)}", flush=True)
    if "--ours-only" in sys.argv:
        return
    for kind, name in (
        ("function", "plain Ray Tune, function trainables"),
        ("class", "plain Ray Tune, class trainables without reuse"),
    ):
        print(f"{name}: {measure_rival(kind).as_text(num_slots)}", flush=True)


def measure_ours() -> Measured:
    """Run our command and read its tables."""
    with tempfile.TemporaryDirectory() as folder:
        space = Path(folder) / "busy.yaml"
        task = Path(__file__).with_name("busy_task.py")
        space.write_text(SPACE.format(task=task))
        output = Path(folder) / "out"
        started = time.time()
        run("stability_search", "run", "--space", str(space), "--output", str(output))
        trials = read_run(output).trials
    timed = trials[trials["stage"] != "confirm"]
    begun = pd.to_datetime(timed["started_at"]).map(lambda stamp: stamp.timestamp())
    return Measured(
        num_trials=len(timed),
        train_s=float(timed["train_s"].sum()),
        first_s=float(begun.min()) - started,
        elapsed_s=float((begun + timed["wall_s"]).max()) - started,
    )


def measure_rival(kind: str) -> Measured:
    """Run a rival in a process of its own, and read what its trials wrote down."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        run("tests.benchmarks.bench_slots", "--rival", kind, folder)
        spans = [path.read_text().split() for path in Path(folder).glob("*.span")]
    if len(spans) != NUM_RIVAL_TRIALS:
        sys.exit(f"{kind}: {len(spans)} of {NUM_RIVAL_TRIALS} trials ended")
    return Measured(
        num_trials=len(spans),
        train_s=sum(float(train_s) for _, train_s, _ in spans),
        first_s=min(float(begun) for begun, _, _ in spans) - started,
        elapsed_s=max(float(ended) for _, _, ended in spans) - started,
    )


def run(module: str, *words: str) -> None:
    """Run a module as a command."""
    finished = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", module, *words], check=False, capture_output=True, text=True
    )
    if finished.returncode not in {0, 3}:
        sys.exit(finished.stderr)


# -- the rivals ---------------------------------------------------------------------------------


def run_rival(kind: str, folder: Path) -> None:
    """Search as a user of Ray Tune would, with its defaults."""
    import ray
    from ray import tune

    def function(config: dict[str, float]) -> None:
        trial = RivalTrial(config["learning_rate"], folder)
        for _ in range(STEPS):
            tune.report({"loss": trial.step()})
        trial.close()

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, float]) -> None:
            self._trial = RivalTrial(config["learning_rate"], folder)

        def step(self) -> dict[str, float | bool]:
            loss = self._trial.step()
            is_done = self._trial.num_steps == STEPS
            if is_done:
                self._trial.close()
            return {"loss": loss, "done": is_done}

    ray.init(address="local", include_dashboard=False, num_cpus=len(os.sched_getaffinity(0)))
    trainable: Any = function if kind == "function" else Trainable
    tune.Tuner(
        trainable,
        param_space={"learning_rate": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(num_samples=NUM_RIVAL_TRIALS, metric="loss", mode="min"),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), verbose=0),
    ).fit()
    ray.shutdown()


class RivalTrial:
    """One trial of the busy task in a plain loop.

    Args:
        learning_rate: Of the optimizer.
        folder: Where it writes down when it ran.
    """

    def __init__(self, learning_rate: float, folder: Path) -> None:
        import torch

        from tests.benchmarks.busy_task import Busy

        self._folder = folder
        self._begun = time.time()
        self._train_s = 0.0
        self.num_steps = 0
        torch.set_num_threads(1)
        self._task = Busy()
        self._model = self._task.model()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=learning_rate)
        self._batches = self._task.batches(16, torch.Generator().manual_seed(0))

    def step(self) -> float:
        """Train one step and return its loss."""
        began = time.perf_counter()
        loss = self._task.loss(self._model, next(self._batches))
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._train_s += time.perf_counter() - began
        self.num_steps += 1
        return float(loss.detach())

    def close(self) -> None:
        """Write down when the trial ran."""
        path = self._folder / f"{self._begun}-{os.getpid()}.span"
        path.write_text(f"{self._begun} {self._train_s} {time.time()}")


if __name__ == "__main__":
    main()
