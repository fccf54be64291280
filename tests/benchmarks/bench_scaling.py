"""How long a study takes on 1, 10 and 100 GPUs, and what TPE learns with so many in flight.

    PYTHONPATH=. python tests/benchmarks/bench_scaling.py [--trials 48 480] [--slots 1 10 100]
        [--seeds 5] [--top 3]

Time is simulated: the study's own plan says which trial comes next, the trial's end is made up,
and a clock that nobody waits for says when it comes. A trial of the search takes one unit, one of
twice the steps two, a killed one its share; each varies by up to a tenth. What Ray and the driver
cost is left out: tests/benchmarks/bench_driver.py measures that. "held" counts a worker as long as
it keeps its place: on a cluster it gives it back after a minute without work.
"""

import argparse
import dataclasses
import heapq
import math
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stability_search import space as spaces
from stability_search.records.trial import Outcome, Stage, TrialSummary
from stability_search.search.plan import StudyPlan
from stability_search.search.request import TrialRequest
from tests.search.inline_study import pretend

IDLE_UNITS = 0.2  # a minute, where a trial of the search takes five

SPACE = """\
task: teacher
seed: {seed}
trial: {{steps: 200}}
space:
  learning_rate: {{loguniform: {{low: 1e-5, high: 1.0}}}}
  weight_decay: {{uniform: {{low: 0, high: 0.4}}}}
  beta1: {{uniform: {{low: 0.5, high: 0.99}}}}
  warmup_steps: {{int: {{low: 0, high: 100}}}}
  clip_norm: {{choice: [null, 0.5, 1.0, 5.0]}}
search: {{trials: {trials}}}
confirm: {{top: {top}, seeds: 5, steps: 400}}
"""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """How one simulated study went; times in units of a search trial."""

    slots: int
    trials: dict[Stage, int]
    spans: dict[Stage, float]
    busy: float
    held: float
    hidden_loss: float

    @property
    def makespan(self) -> float:
        return sum(self.spans.values())


def made_up(request: TrialRequest) -> TrialSummary:
    """Be a trial whose loss is best at one place of the space, and which dies above a rate."""
    summary = pretend(request)
    if summary.outcome is not Outcome.COMPLETED:
        return summary
    extra = distance(request)
    probes = tuple(probe + extra * min(1.0, i / 4) for i, probe in enumerate(summary.probe_losses))
    batches = tuple((probe,) * 4 for probe in probes)
    return dataclasses.replace(summary, probe_losses=probes, probe_batch_losses=batches)


def distance(request: TrialRequest) -> float:
    """Return how much worse a configuration is than the best of its learning rate."""
    settings = request.settings
    parts = [
        float(settings["weight_decay"] or 0.0) / 0.4 - 0.3,
        (float(settings["beta1"] or 0.9) - 0.9) / 0.5,
        float(settings["warmup_steps"] or 0.0) / 100 - 0.5,
        0.0 if settings["clip_norm"] == 1.0 else 0.3,
    ]
    return sum(part**2 for part in parts)


def units(request: TrialRequest, summary: TrialSummary, jitter: random.Random) -> float:
    whole = request.config.num_planned_steps / 200
    done = summary.num_steps / summary.num_planned_steps
    return whole * done * jitter.uniform(0.9, 1.1)


class Held:
    """Adds up for how long idle workers hold their places; a worker's start takes no time here.

    The one that has been idle for longest is taken first, as Ray Tune does.
    """

    def __init__(self, slots: int) -> None:
        self._since = [0.0] * slots
        self.idle = 0.0

    def begin(self, now: float) -> None:
        """Take an idle worker, or start one."""
        self._give_back(now)
        if self._since:
            self.idle += now - self._since.pop(0)

    def end(self, now: float, *, is_pilot: bool) -> None:
        """Have one worker more that is idle; in the pilot none is given back."""
        if is_pilot:
            self.idle += sum(now - since for since in self._since)
            self._since = [now] * len(self._since)
        self._give_back(now)
        self._since.append(now)

    def _give_back(self, now: float) -> None:
        kept = [since for since in self._since if now - since <= IDLE_UNITS]
        self.idle += IDLE_UNITS * (len(self._since) - len(kept))
        self._since = kept


def simulate(folder: Path, *, trials: int, top: int, slots: int, seed: int) -> Course:
    """Run a study on a clock of its own."""
    path = folder / "space.yaml"
    path.write_text(SPACE.format(trials=trials, top=top, seed=seed))
    plan = StudyPlan(spaces.load(path), device="cpu")
    jitter = random.Random(seed)  # noqa: S311 - how long trials take, no secret
    running: list[tuple[float, int, TrialRequest, TrialSummary]] = []
    now, busy, number, last = 0.0, 0.0, 0, Stage.PILOT
    held = Held(slots)
    spans: Counter[Stage] = Counter()
    best = math.inf
    while True:
        while len(running) < slots and (request := plan.next_trial()) is not None:
            summary = made_up(request)
            takes = units(request, summary, jitter)
            busy, number = busy + takes, number + 1
            held.begin(now)
            heapq.heappush(running, (now + takes, number, request, summary))
        if not running:
            break
        end, _, request, summary = heapq.heappop(running)
        spans[request.stage] += end - now
        now, last = end, request.stage
        held.end(now, is_pilot=last is Stage.PILOT)
        plan.finish(request, summary, started_at="", node="here")
        if last is Stage.SEARCH and summary.outcome is Outcome.COMPLETED:
            best = min(best, summary.probe_losses[-1])
    counts = Counter(row.stage for row in plan.rows)
    return Course(
        slots=slots,
        trials=dict(counts),
        spans=dict(spans),
        busy=busy / (now * slots),
        held=(busy + held.idle) / (now * slots),
        hidden_loss=best - 1.0,
    )


def show(trials: int, courses: Sequence[Course]) -> None:
    for slots in dict.fromkeys(course.slots for course in courses):
        chosen = [course for course in courses if course.slots == slots]

        def mean(values: Sequence[float]) -> float:
            return statistics.fmean(values)

        stages = "  ".join(
            f"{stage} {mean([c.spans[stage] for c in chosen]):6.1f} units"
            f" ({mean([c.trials[stage] for c in chosen]):5.1f} trials)"
            for stage in Stage
        )
        print(
            f"{trials:5d} search trials, {slots:3d} slots: {stages}"
            f"  all {mean([c.makespan for c in chosen]):7.1f}"
            f"  busy {mean([c.busy for c in chosen]):.2f}"
            f"  held {mean([c.held for c in chosen]):.2f}"
            f"  best found {mean([c.hidden_loss for c in chosen]):.4f} above the optimum"
        )


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[48, 480])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--top", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for trials in chosen.trials:
            courses = [
                simulate(Path(folder), trials=trials, top=chosen.top, slots=slots, seed=seed)
                for slots in chosen.slots
                for seed in range(chosen.seeds)
            ]
            show(trials, courses)


if __name__ == "__main__":
    main()
