"""How busy 64 slots are on 8 logical nodes of this machine, with trials that wait.

    python -m tests.benchmarks.bench_cluster [--slots 64] [--waves 6] [--trial-s 20]
        [--methods ours reused function class]

Eight raylets with logical cores, and a study of ours as `run --address` drives it: plan, ledger,
step files, reports. Its workers wait instead of training, so that cores of one machine can stand
for those of eight. Then plain Ray Tune on the same raylets, set up as its own documentation does,
with as many trials that wait as long and report as often: a class trainable whose workers are
used again, a function, a class whose workers are not used again.

Busy is the share of slot time in trials up to the last one's begin, from two moments: the first
trial's begin, and when 95 % of the slots were first busy together, all workers having started by
then. The whole start and the ragged end are in the figures "with start and end". What starts a
worker here is two cores for all eight nodes, which is the longest part of it: load the machine
with anything else, and the rivals take many minutes. Each is stopped after `--limit-s`; its
figures are then of the trials that had ended.
"""

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from stability_search.interruption import Signals
from stability_search.records.trial import Stage
from stability_search.search import trainable
from stability_search.search.driver import Cluster, drive, output_to
from stability_search.search.machine import Machine
from stability_search.search.request import Order, TrialRequest
from stability_search.search.worker import Report, ReportKind
from tests.benchmarks import bench_driver
from tests.benchmarks.bench_driver import Study, Until, made_up, made_up_steps, new_study

NUM_NODES = 8
_FULL = 0.95  # of the slots: with that many busy all workers have started
STORE_BYTES = 80 * 2**20


class Span:
    """One trial that waits, up to a fifth more or less than asked.

    Args:
        trial_s: Seconds to wait.
        report_s: Seconds between two reports.
        folder: Where it writes down when it ran.
    """

    def __init__(self, trial_s: float, report_s: float, folder: str) -> None:
        self._report_s, self._folder = report_s, folder
        self._name = uuid.uuid4().hex
        self._begun = time.time()
        spread = random.Random(self._name).uniform(0.8, 1.2)  # noqa: S311 - no secret
        self._end = self._begun + trial_s * spread

    def wait(self) -> bool:
        """Wait until the next report is due, or the end; return True at the end."""
        time.sleep(max(0.0, min(self._report_s, self._end - time.time())))
        if time.time() < self._end:
            return False
        Path(self._folder, self._name).write_text(f"{self._begun} {time.time()}")
        return True


class WaitingWorker:
    """Waits and hands a made-up result over, in the reports of a real worker.

    Args:
        trial_s: Seconds a trial takes.
        report_s: Seconds between two reports.
        folder: Where trials write down when they ran.
        steps: What every trial hands over as its steps.
    """

    is_clean = True

    def __init__(self, trial_s: float, report_s: float, folder: str, steps: bytes) -> None:
        self._arguments = trial_s, report_s, folder
        self._steps = steps
        self._is_known = False

    def take(self, order: str) -> None:
        """Take the next trial."""
        self._order = order
        is_pilot = Order.from_text(order).constants.e0 is None  # it is over at once
        self._span = None if is_pilot else Span(*self._arguments)

    def next_report(self) -> Report:
        """Report as often as a real worker does."""
        if not self._is_known:
            self._is_known = True
            return Report(kind=ReportKind.STARTED)
        if self._span is not None and not self._span.wait():
            text = '{"step": 1, "num_bad_steps": 0, "scale": null, "grad_norm": 1, "loss": 1}'
            return Report(kind=ReportKind.PROGRESS, payload=text)
        summary = made_up(Order.from_text(self._order), random.Random(self._order))  # noqa: S311
        return Report(kind=ReportKind.ENDED, payload=(json.dumps(summary.to_json()), self._steps))


class Exactly(Until):
    """A study of so many search trials; none is left in flight at the end."""

    def __init__(self, study: Study, size: int) -> None:
        super().__init__(study, size)
        self._num_left = size

    def next_trial(self) -> TrialRequest | None:
        """Return the plan's next trial while there are trials left."""
        request = super().next_trial() if self._num_left else None
        self._num_left -= request is not None and request.stage is Stage.SEARCH
        return request


def waiting_trainable(trial_s: float, folder: str) -> type[trainable.TrialTrainable]:
    """Return the trainable of ours with a worker that waits."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(bench_driver)  # a real worker does not import the driver
    steps = made_up_steps()

    class Waiting(trainable.TrialTrainable):
        def setup(self, config: dict[str, Any]) -> None:
            report_s = config["worker"]["report_s"]
            self._worker: Any = WaitingWorker(trial_s, report_s, folder, steps)
            self._longest_pause_s = report_s
            self._take(config)

    return Waiting


def run_ours(address: str, folder: str, options: argparse.Namespace) -> None:
    """Drive a study of ours until enough trials have ended."""
    trainable.TrialTrainable = waiting_trainable(options.trial_s, folder)  # type: ignore[misc]
    study = new_study(Path(folder).parent / "study", sampler="random")
    source = Exactly(study, options.slots * options.waves)
    machine = Machine(device="cpu", num_slots=options.slots, cpu_per_trial=1.0, gpu_per_trial=0.0)
    signals = Signals()
    with output_to(study.directory.log), Cluster(address) as cluster:
        here = study.directory.path
        drive(source, cluster=cluster, machine=machine, folder=here, signals=signals)
    signals.restore()
    study.ledger.close()


def run_tune(
    address: str, folder: str, options: argparse.Namespace, *, kind: str, reuses_actors: bool
) -> None:
    """Run as many trials by plain Ray Tune."""
    import ray
    from ray import tune

    def waiting(config: dict[str, Any]) -> None:
        span = Span(config["trial_s"], config["report_s"], config["folder"])
        while not span.wait():
            tune.report({"loss": 1.0})
        tune.report({"loss": 1.0})

    class Waiting(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._span = Span(config["trial_s"], config["report_s"], config["folder"])

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.setup(new_config)
            return True

        def step(self) -> dict[str, Any]:
            return {"loss": 1.0, "done": self._span.wait()}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            """Have nothing to keep; Tune asks at the end of every trial."""

        def load_checkpoint(self, checkpoint: Any) -> None:  # noqa: ANN401 - Tune's
            """Have nothing to go on from."""

    ray.init(address=address, log_to_driver=False, logging_level="error")
    report_s = max(1.0, options.slots / 25)  # as often as ours
    tune.Tuner(
        tune.with_resources(waiting if kind == "function" else Waiting, {"cpu": 1}),
        param_space={"trial_s": options.trial_s, "report_s": report_s, "folder": folder},
        tune_config=tune.TuneConfig(
            num_samples=options.slots * options.waves,
            reuse_actors=reuses_actors,
            time_budget_s=options.limit_s,
        ),
        run_config=tune.RunConfig(storage_path=str(Path(folder).parent / "tune"), verbose=0),
    ).fit()
    ray.shutdown()


METHODS: dict[str, tuple[str, Callable[..., None]]] = {
    "ours": ("ours", run_ours),
    "reused": (
        "plain Ray Tune, class, workers reused",
        partial(run_tune, kind="class", reuses_actors=True),
    ),
    "function": (
        "plain Ray Tune, function",
        partial(run_tune, kind="function", reuses_actors=False),
    ),
    "class": ("plain Ray Tune, class", partial(run_tune, kind="class", reuses_actors=False)),
}


def read_span(path: Path) -> tuple[float, float]:
    """Return when a trial began and ended."""
    begun, ended = map(float, path.read_text().split())
    return begun, ended


def num_busy(spans: Sequence[tuple[float, float]], now: float) -> int:
    """Return how many trials run at a moment."""
    return sum(begun <= now < ended for begun, ended in spans)


def busy(spans: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """Return how many slots are busy between two moments, on average."""
    within = (min(ended, until) - max(begun, since) for begun, ended in spans)
    return sum(max(0.0, seconds) for seconds in within) / max(until - since, 1e-9)


def measure(name: str, options: argparse.Namespace, work: Callable[[str], None]) -> None:
    """Time one way to run the trials, and print its figures."""
    slots = options.slots
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        folder = Path(home, "spans")
        folder.mkdir()
        started, cpu_s = time.time(), time.process_time()
        work(str(folder))
        cpu_s = time.process_time() - cpu_s
        spans = [read_span(path) for path in folder.iterdir()]
    begins = sorted(begun for begun, _ in spans)
    last, whole = begins[-1], max(ended for _, ended in spans) - started
    full = next((t for t in begins if num_busy(spans, t) >= _FULL * slots), last)
    shares = [busy(spans, since, last) / slots for since in (begins[0], full)]
    overall = busy(spans, started, started + whole) / slots
    print(
        f"{name}: {len(spans)} of {slots * options.waves} trials; slots busy {shares[0]:.2f} of "
        f"the time from the first begin to the last, {shares[1]:.2f} once {_FULL:.0%} were; first "
        f"trial after {begins[0] - started:.1f} s, all slots after {full - started:.1f} s; "
        f"{len(spans) / whole:.2f} trials/s and "
        f"busy {overall:.2f} with start and end, in {whole:.0f} s; CPU of the driver "
        f"{cpu_s / whole:.2f} of a core; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def main() -> None:
    """Start the raylets and measure ours and its rivals on them."""
    from ray.cluster_utils import Cluster as Raylets

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--waves", type=int, default=6)
    parser.add_argument("--trial-s", type=float, default=20.0)
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {len(os.sched_getaffinity(0))} cores, Python "
        f"{platform.python_version()}, {NUM_NODES} raylets with {options.slots // NUM_NODES} "
        f"logical cores each, trials of {options.trial_s:g} s, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    folder = tempfile.mkdtemp(prefix="bc-")  # short: paths of sockets end at 107 bytes
    node = {"num_cpus": options.slots // NUM_NODES, "object_store_memory": STORE_BYTES}
    raylets = Raylets(
        initialize_head=True,
        head_node_args={**node, "include_dashboard": False, "temp_dir": folder},
    )
    try:
        for _ in range(NUM_NODES - 1):
            raylets.add_node(**node)
        address = raylets.address
        for method in options.methods:
            name, work = METHODS[method]
            measure(name, options, partial(work, address, options=options))
    finally:
        raylets.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
