"""Run a study without Ray: the plan is asked, trials run here, one after the other."""

import math
import random
from collections.abc import Callable
from pathlib import Path

from stability_search.records.trial import Outcome, TrialRow, TrialSummary
from stability_search.search.breakers import Breakers, refuse_settings
from stability_search.search.plan import StudyPlan
from stability_search.search.request import TrialRequest
from stability_search.trial import run_trial

TINY = Path(__file__).resolve().parents[1] / "tiny_task.py"

Runner = Callable[[TrialRequest], TrialSummary]

SPACE = """\
name: tiny
task: {task}:Tiny
trial: {{steps: 20, timeout_s: 60}}
fixed: {{batch_size: 8}}
space:
  learning_rate: {{loguniform: {{low: 1e-4, high: 1.0}}}}
  clip_norm: {{choice: [null, 1.0]}}
start_with:
  - {{learning_rate: 0.01, clip_norm: 1.0}}
search: {{trials: 6, sampler: {sampler}}}
confirm: {{top: 1, seeds: 2, steps: 30, octaves: 1, min_margin: 0}}
"""


def write_space(folder: Path, *, sampler: str = "tpe", text: str = SPACE) -> Path:
    """Write a small space file beside a copy of the tiny task."""
    task = folder / TINY.name
    task.write_text(TINY.read_text())
    path = folder / "tiny.yaml"
    path.write_text(text.format(task=f"./{TINY.name}", sampler=sampler))
    return path


def train(request: TrialRequest) -> TrialSummary:
    """Run the trial for real, in this process."""
    generator = run_trial(request.config, constants=request.constants, preflight=request.preflight)
    while True:
        try:
            next(generator)
        except StopIteration as end:
            summary: TrialSummary = end.value
            return summary


def pretend(request: TrialRequest) -> TrialSummary:
    """Make a summary up: learning is best at a rate of 0.03, and rates above 0.3 are killed."""
    rate, horizon = request.config.engine.learning_rate, request.config.num_planned_steps
    steps = request.constants.probe_steps
    seed_noise = (request.config.seed % 1000) / 1e6
    if rate > 0.3:
        return TrialSummary(
            outcome=Outcome.PRUNED,
            reason="3 bad steps of 3",
            num_planned_steps=horizon,
            num_steps=3,
            num_judged_steps=3,
            num_bad_steps=3,
            judged_losses=(None, None, None),
            judged_steps=(1, 2, 3),
        )
    best = 1.0 + abs(math.log10(rate / 0.03)) + seed_noise
    probes = tuple(3.0 + (best - 3.0) * min(1.0, 2 * step / horizon) for step in steps)
    return TrialSummary(
        outcome=Outcome.COMPLETED,
        num_planned_steps=horizon,
        num_steps=horizon,
        num_judged_steps=horizon,
        judged_losses=tuple(2.0 for _ in range(horizon)),
        judged_steps=tuple(range(1, horizon + 1)),
        probe_steps=steps,
        probe_losses=probes,
        probe_batch_losses=tuple((loss,) * 4 for loss in probes),
        baseline=3.0 if request.constants.measures_blind_run else None,
        wall_s=1.0,
    )


def lost(request: TrialRequest) -> TrialSummary:
    """Be a worker that died."""
    return TrialSummary(
        outcome=Outcome.INFRASTRUCTURE,
        reason="its worker died",
        num_planned_steps=request.config.num_planned_steps,
    )


def run_all(
    plan: StudyPlan, runner: Runner = pretend, *, slots: int = 1, order_seed: int = 0
) -> list[TrialRow]:
    """Run until there is a verdict; with several slots, trials finish in a shuffled order."""
    shuffle = random.Random(order_seed)  # noqa: S311 - an order, no secret
    running: list[TrialRequest] = []
    breakers = Breakers(plan.rows)
    while True:
        while len(running) < slots and (request := plan.next_trial()) is not None:
            running.append(request)
        if not running:
            assert plan.verdict is not None, "the plan neither asks for a trial nor ends"
            return plan.rows
        request = running.pop(shuffle.randrange(len(running)))
        row = plan.finish(request, runner(request), started_at="", node="here")
        refuse_settings(row)
        breakers.take(row)
