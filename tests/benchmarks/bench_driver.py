"""What a trial costs the driver at 100, 1,000 and 10,000 trials, without work in them.

    PYTHONPATH=. python tests/benchmarks/bench_driver.py [--trials 100 1000 10000]
        [--sampler random tpe] [--ray]

The study's own code runs: plan, sampler, step file, ledger, events; eight trials in flight, whose
results are made up. Seconds are those of the last 100 trials before each size, measured by the
clock and as CPU time of the process. A sampler that learns is not asked for every one of 10,000
trials: it resumes copies of the ledgers that `random` left, which times the resume as well.

With --ray the trials run through Ray Tune, in a trainable that returns at once; then the whole
wall time counts.
"""

import argparse
import itertools
import json
import math
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stability_search import space as spaces
from stability_search.events import ignore
from stability_search.interruption import Signals
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search import run_directory, trainable
from stability_search.search.driver import Cluster, drive, output_to
from stability_search.search.ledger import Ledger
from stability_search.search.machine import Machine
from stability_search.search.news import News
from stability_search.search.nodes import facts_here
from stability_search.search.request import Order, TrialRequest
from stability_search.search.run_directory import RunDirectory
from stability_search.search.source import Place
from stability_search.search.study_source import StudySource
from stability_search.search.worker import Report, ReportKind
from stability_search.space import Space
from stability_search.step_files import encode_steps

IN_FLIGHT = 8
PLACE = Place(host="here", facts=facts_here(""))
WINDOW = 100  # trials at the end of each size that are timed
STEPS = 200
SPACE = """\
task: teacher
trial: {steps: 200}
space:
  learning_rate: {loguniform: {low: 1e-5, high: 1.0}}
  precision: {choice: [fp32, bf16, fp16]}
  init_scale: {choice: [1024, 65536], when: {precision: fp16}}
  clip_norm: {choice: [null, 0.5, 1.0]}
  weight_decay: {uniform: {low: 0, high: 0.1}}
  warmup_steps: {int: {low: 0, high: 20}}
confirm: {steps: 200}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the last trials before a size cost the driver, in milliseconds each."""

    size: int
    wall_ms: float
    cpu_ms: float
    worst_ms: float
    resume_s: float | None = None


def made_up(
    order: Order, generator: random.Random, *, is_stage_pilot: bool = False
) -> TrialSummary:
    """Be a trial of 200 steps that learns best at a rate of 0.003, and is killed above 0.1."""
    rate = order.config.engine.learning_rate
    if rate > 0.1 and not is_stage_pilot:
        return TrialSummary(
            outcome=Outcome.PRUNED,
            reason="3 bad steps of 3",
            num_planned_steps=STEPS,
            num_steps=3,
            num_judged_steps=3,
            num_bad_steps=3,
            judged_losses=(None, None, None),
            judged_steps=(1, 2, 3),
        )
    end = 1.0 + abs(math.log10(rate / 0.003)) / 2 + 0.05 * generator.random()
    losses = tuple(
        end + (3.0 - end) * math.exp(-step / 30) + 0.05 * generator.random()
        for step in range(STEPS)
    )
    probes = tuple(
        end + (3.0 - end) * math.exp(-step / 30) for step in order.constants.probe_steps
    )
    return TrialSummary(
        outcome=Outcome.COMPLETED,
        num_planned_steps=STEPS,
        num_steps=STEPS,
        num_judged_steps=STEPS,
        judged_losses=losses,
        judged_steps=tuple(range(1, STEPS + 1)),
        probe_steps=order.constants.probe_steps,
        probe_losses=probes,
        probe_batch_losses=tuple(
            tuple(probe + 0.01 * generator.random() for _ in range(4)) for probe in probes
        ),
        baseline=3.0 if order.constants.measures_blind_run else None,
        wall_s=1.0,
    )


def made_up_steps() -> bytes:
    """Return the step records of one trial, as a worker sends them."""
    records = [
        StepRecord(
            step=step,
            label=StepLabel.OK,
            loss=3.0 / step,
            is_loss_finite=True,
            grad_norm=1.0 / step,
            is_grad_finite=True,
            clipped=False,
            is_applied=True,
            learning_rate=0.01,
            scale=None,
        )
        for step in range(1, STEPS + 1)
    ]
    return encode_steps(records)


def new_study(folder: Path, *, sampler: str, ledger: Path | None = None) -> "Study":
    """Begin a study in an empty folder, or go on from the copy of a ledger."""
    text = folder.with_suffix(".yaml")
    text.write_text(SPACE)
    space = spaces.load(text, [f"search.sampler={sampler}", "search.trials=1000000"])
    facts = run_directory.study_facts(space)
    directory = run_directory.create(folder, space, facts=facts, environment={})
    if ledger is not None:
        shutil.copy(ledger, directory.ledger)
    started = time.process_time()
    opened = Ledger.create(directory.ledger, facts) if ledger is None else Ledger(directory.ledger)
    study = Study(space, directory, opened)
    study.resume_s = None if ledger is None else time.process_time() - started
    return study


class Study:
    """A study whose trials do no work, timed trial by trial."""

    def __init__(self, space: Space, directory: RunDirectory, ledger: Ledger) -> None:
        self.resume_s: float | None = None
        self.directory = directory
        self.ledger = ledger
        self.machine = Machine(
            device="cpu", num_slots=IN_FLIGHT, cpu_per_trial=1.0, gpu_per_trial=0.0
        )
        self.source = StudySource(
            space,
            directory,
            ledger,
            machine=self.machine,
            command="",
            news=News(space, ignore),
        )
        self.source.begin()
        self._in_flight: deque[TrialRequest] = deque()
        self._generator = random.Random(len(ledger.rows()))  # noqa: S311 - no secret
        self._steps = made_up_steps()

    def trials(self) -> Iterator[tuple[float, float]]:
        """Run search trials one after the other; give wall and CPU seconds of the driver each."""
        while True:
            wall, cpu = time.perf_counter(), time.process_time()
            while len(self._in_flight) < IN_FLIGHT:
                request = self.source.next_trial()
                if request is None:
                    break
                self.source.trial_started(request, PLACE.host)
                self._in_flight.append(request)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            request = self._in_flight.popleft()
            is_pilot = request.stage is Stage.PILOT
            order = Order.from_text(request.to_text())
            summary = made_up(order, self._generator, is_stage_pilot=is_pilot)
            then, cpu_then = time.perf_counter(), time.process_time()
            self.source.trial_ended(request, summary, self._steps, PLACE)
            self.source.settle()
            wall += time.perf_counter() - then
            cpu += time.process_time() - cpu_then
            if not is_pilot:
                yield wall, cpu


def cost_of(size: int, timed: Sequence[tuple[float, float]], resume_s: float | None) -> Cost:
    """Sum the last trials up."""
    walls, cpus = zip(*timed, strict=True)
    return Cost(
        size=size,
        wall_ms=1e3 * sum(walls) / len(walls),
        cpu_ms=1e3 * sum(cpus) / len(cpus),
        worst_ms=1e3 * max(walls),
        resume_s=resume_s,
    )


def drive_random(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[Cost, Study]]:
    """Run one study of random trials, and say what they cost at every size."""
    study = new_study(folder / "random", sampler="random")
    timed: deque[tuple[float, float]] = deque(maxlen=WINDOW)
    for number, seconds in enumerate(study.trials(), start=1):
        timed.append(seconds)
        if number in [size - WINDOW for size in sizes]:
            shutil.copy(study.directory.ledger, folder / f"{number + WINDOW}.db")
        if number in sizes:
            yield cost_of(number, timed, None), study
        if number == max(sizes):
            break
    study.ledger.close()


def drive_on(folder: Path, sizes: Sequence[int], sampler: str) -> Iterator[tuple[Cost, Study]]:
    """Go on from the copies with another sampler."""
    for size in sizes:
        kept = folder / f"{size}.db"
        ledger = kept if kept.exists() else None
        study = new_study(folder / f"{sampler}-{size}", sampler=sampler, ledger=ledger)
        trials = study.trials()
        yield cost_of(size, [next(trials) for _ in range(WINDOW)], study.resume_s), study
        study.ledger.close()


class IdleWorker:
    """Hands a made-up result over at once, in the reports of a real worker."""

    is_clean = True

    def __init__(self) -> None:
        self._steps = made_up_steps()
        self._is_known = False
        self._order = ""

    def take(self, order: str) -> None:
        """Take the next trial."""
        self._order = order

    def next_report(self) -> Report:
        """Say that the process is there, once, and after that how each trial ended."""
        if not self._is_known:
            self._is_known = True
            return Report(kind=ReportKind.STARTED)
        summary = made_up(Order.from_text(self._order), random.Random(self._order))  # noqa: S311
        return Report(kind=ReportKind.ENDED, payload=(json.dumps(summary.to_json()), self._steps))


class Idle(trainable.TrialTrainable):
    """The study's own trainable around a worker that does nothing."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the first trial."""
        self._worker = IdleWorker()  # type: ignore[assignment]
        self._take(config)


class Until:
    """A study that is over after so many search trials."""

    def __init__(self, study: Study, size: int) -> None:
        self._study = study.source
        self._size = size
        self.ended_at: list[tuple[float, float]] = []  # by the clock, and CPU time

    @property
    def is_over(self) -> bool:
        """True once all have ended."""
        return len(self.ended_at) >= self._size

    def next_trial(self) -> TrialRequest | None:
        """Return the plan's next trial."""
        return None if self.is_over else self._study.next_trial()

    def trial_started(self, request: TrialRequest, node: str) -> None:
        """Pass it on."""
        self._study.trial_started(request, node)

    def trial_progressed(self, request: TrialRequest, progress: Mapping[str, Any]) -> None:
        """Pass it on."""
        self._study.trial_progressed(request, progress)

    def trial_ended(
        self, request: TrialRequest, summary: TrialSummary, steps: bytes | None, place: Place
    ) -> None:
        """Pass it on, and look at the clock."""
        self._study.trial_ended(request, summary, steps, place)
        if request.stage is Stage.SEARCH:
            self.ended_at.append((time.perf_counter(), time.process_time()))

    def node_quarantined(self, node: str, reason: str) -> None:
        """Refuse: nothing here loses a worker."""
        raise AssertionError(f"{node}: {reason}")

    def noticed(self, text: str) -> None:
        """Pass it on."""
        self._study.noticed(text)

    def settle(self) -> None:
        """Pass it on."""
        self._study.settle()


def drive_ray(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[Cost, Study]]:
    """Run one study through Ray Tune, two trials at once."""
    trainable.TrialTrainable = Idle  # type: ignore[misc]  # the driver takes it from there
    study = new_study(folder / "ray", sampler="random")
    source, signals = Until(study, max(sizes)), Signals()
    machine = Machine(device="cpu", num_slots=2, cpu_per_trial=1.0, gpu_per_trial=0.0)
    with output_to(study.directory.log), Cluster(None) as cluster:
        drive(
            source, cluster=cluster, machine=machine, folder=study.directory.path, signals=signals
        )
    study.ledger.close()
    for size in sizes:
        ends = source.ended_at[max(0, size - WINDOW - 1) : size]
        gaps = [
            (later[0] - earlier[0], later[1] - earlier[1])
            for earlier, later in itertools.pairwise(ends)
        ]
        yield cost_of(size, gaps, None), study


def say(name: str, costs: Iterator[tuple[Cost, Study]]) -> None:
    """Print a line a size."""
    first: Cost | None = None
    for cost, study in costs:
        first = first or cost
        line = (
            f"{name:7} {cost.size:6} trials: {cost.wall_ms:7.1f} ms wall, {cost.cpu_ms:7.1f} ms "
            f"CPU a trial (x{cost.wall_ms / first.wall_ms:.2f}, "
            f"x{cost.cpu_ms / (first.cpu_ms or math.inf):.2f}; worst {cost.worst_ms:.0f} ms); "
            f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB, "
            f"ledger {study.directory.ledger.stat().st_size / 2**20:.1f} MiB"
        )
        print(line if cost.resume_s is None else f"{line}; resume {cost.resume_s:.1f} s CPU")
        sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--sampler", nargs="+", default=["random", "tpe"])
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    sizes = sorted(options.trials)
    cpus = len(os.sched_getaffinity(0))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {cpus} CPUs, Python "
        f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}; last {WINDOW} trials"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.ray:
            say("ray", drive_ray(folder, sizes))
            return
        say("random", drive_random(folder, sizes))
        for sampler in options.sampler:
            if sampler != "random":
                say(sampler, drive_on(folder, sizes, sampler))


if __name__ == "__main__":
    main()
