"""How busy 64 slots are on 8 logical nodes of this machine, with trials that wait.

    python -m tests.benchmarks.bench_cluster [--slots 64] [--waves 4] [--trial-s 20]

Eight raylets with logical cores, and a study of ours as `run --address` drives it: plan, ledger,
step files, reports. Its workers wait instead of training, so that cores of one machine can stand
for those of eight. Then plain Ray Tune on the same raylets: a class trainable that waits as long
and reports as often, with its workers used again and without.

Busy, from the first trial of the search on, is the share of slot time in trials between the
first trial's begin and the last one's begin: starting the workers and the ragged end are told
apart.
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
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stability_search.interruption import Signals
from stability_search.search import trainable
from stability_search.search.driver import Cluster, drive, output_to
from stability_search.search.machine import Machine
from stability_search.search.request import Order
from stability_search.search.worker import Report, ReportKind
from tests.benchmarks.bench_driver import Until, made_up, made_up_steps, new_study

NUM_NODES = 8
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
    """

    is_clean = True

    def __init__(self, trial_s: float, report_s: float, folder: str) -> None:
        self._arguments = trial_s, report_s, folder
        self._steps = made_up_steps()
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


def waiting_trainable(trial_s: float, folder: str) -> type[trainable.TrialTrainable]:
    """Return the trainable of ours with a worker that waits."""

    class Waiting(trainable.TrialTrainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._worker: Any = WaitingWorker(trial_s, config["worker"]["report_s"], folder)
            self._take(config)

    return Waiting


def run_ours(address: str, folder: str, options: argparse.Namespace) -> None:
    """Drive a study of ours until enough trials have ended."""
    trainable.TrialTrainable = waiting_trainable(options.trial_s, folder)  # type: ignore[misc]
    study = new_study(Path(folder).parent / "study", sampler="random")
    source = Until(study, options.slots * options.waves)
    machine = Machine(device="cpu", num_slots=options.slots, cpu_per_trial=1.0, gpu_per_trial=0.0)
    signals = Signals()
    with output_to(study.directory.log), Cluster(address) as cluster:
        here = study.directory.path
        drive(source, cluster=cluster, machine=machine, folder=here, signals=signals)
    signals.restore()
    study.ledger.close()


def run_tune(
    address: str, folder: str, options: argparse.Namespace, *, reuses_actors: bool
) -> None:
    """Run as many trials by plain Ray Tune."""
    import ray
    from ray import tune

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
        tune.with_resources(Waiting, {"cpu": 1}),
        param_space={"trial_s": options.trial_s, "report_s": report_s, "folder": folder},
        tune_config=tune.TuneConfig(
            num_samples=options.slots * options.waves,
            max_concurrent_trials=options.slots,
            reuse_actors=reuses_actors,
        ),
        run_config=tune.RunConfig(storage_path=str(Path(folder).parent / "tune"), verbose=0),
    ).fit()
    ray.shutdown()


def measure(name: str, slots: int, work: Callable[[str], None]) -> None:
    """Time one way to run the trials, and print its figures."""
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        folder = Path(home, "spans")
        folder.mkdir()
        started = time.time()
        work(str(folder))
        spans = [tuple(map(float, path.read_text().split())) for path in folder.iterdir()]
    begins, ends = [begun for begun, _ in spans], [ended for _, ended in spans]
    first, last = min(begins), max(begins)
    busy = sum(max(0.0, min(ended, last) - begun) for begun, ended in spans)
    share, whole = busy / (slots * (last - first)), max(ends) - started
    overall = sum(ended - begun for begun, ended in spans) / (slots * whole)
    print(
        f"{name}: {len(spans)} trials, slots busy {share:.2f} of the time; first trial after "
        f"{first - started:.1f} s; {len(spans) / whole:.2f} trials/s and busy {overall:.2f} with "
        f"start and end, in {whole:.0f} s; load {os.getloadavg()[0]:.1f}",
        flush=True,
    )


def main() -> None:
    """Start the raylets and measure ours and its rivals on them."""
    from ray.cluster_utils import Cluster as Raylets

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--waves", type=int, default=4)
    parser.add_argument("--trial-s", type=float, default=20.0)
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
        measure("ours", options.slots, lambda spans: run_ours(address, spans, options))
        for reuses_actors, name in ((True, "with"), (False, "without")):
            measure(
                f"plain Ray Tune {name} reuse",
                options.slots,
                lambda spans, reuse=reuses_actors: run_tune(  # type: ignore[misc]
                    address, spans, options, reuses_actors=reuse
                ),
            )
    finally:
        raylets.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
