"""A conditional space, and results of its configurations as a sampler is told them."""

import math
from collections.abc import Iterator

from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search.sampler import (
    Sampler,
    Told,
    told,
)

SPACE = """\
task: teacher
start_with:
  - {learning_rate: 1e-4, precision: fp16, init_scale: 1024, clip_norm: 1}
  - {learning_rate: 2e-4, precision: fp32}
space:
  learning_rate: {loguniform: {low: 1e-5, high: 1.0}}
  precision: {choice: [fp32, bf16, fp16]}
  init_scale: {choice: [1024, 65536], when: {precision: fp16}}
  clip_norm: {choice: [null, 0.5, 1.0], when: {init_scale: 1024}}
  weight_decay: {uniform: {low: 0, high: 0.1}}
  warmup_steps: {int: {low: 0, high: 3}}
  accumulation_steps: {logint: {low: 1, high: 8}}
"""
TOY = """\
task: teacher
space:
  learning_rate: {loguniform: {low: 1e-5, high: 1.0}}
  clip_norm: {choice: [null, 0.5, 1.0]}
"""
HEALTHY = TrialSummary(
    outcome=Outcome.COMPLETED, num_planned_steps=200, num_steps=200, num_judged_steps=200
)
KILLED = TrialSummary(
    outcome=Outcome.PRUNED, num_planned_steps=200, num_steps=20, num_judged_steps=20
)


def judge(values: dict[str, object], *, cliff: float = 1e-3, best: float = 1e-4) -> Told | None:
    """Judge a configuration: pruned above the cliff, best a decade below it."""
    rate = values["learning_rate"]
    assert isinstance(rate, float)
    if rate > cliff:
        return told(KILLED, 0.0, bad_rate=0.05)
    return told(HEALTHY, math.exp(-abs(math.log(rate / best)) / 2), bad_rate=0.05)


def run(sampler: Sampler, num_trials: int, start: int = 0) -> Iterator[dict[str, object]]:
    for index in range(start, num_trials):
        values = sampler.propose(index)
        sampler.tell(index, judge(values))
        yield values
