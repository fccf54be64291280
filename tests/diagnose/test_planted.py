"""Trainings with a planted cause, and healthy ones; with five seeds they are a benchmark."""

from dataclasses import replace

import pytest

from stability_search.diagnose.conclusion import Verdict
from tests.diagnose.cases import HEALTHY, MORE_PLANTED, PLANTED, judge

EVERY = {**PLANTED, **MORE_PLANTED, **HEALTHY}


def judged(name: str, steps: int) -> Verdict:
    """Diagnose a case over fewer steps than the benchmark does."""
    case = EVERY[name]
    short = replace(case, recipe=replace(case.recipe, steps=steps))
    return judge(short, seed=0)[0]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("name", "steps", "remedy"),
    [
        ("logits_in_fp16", 40, {"attention_precision": "fp32"}),
        ("attention", 80, {"attention_logit_cap": 30.0}),
        ("spoilt_batches", 60, {}),
        ("rate_of_sgd", 60, {"learning_rate": 0.1}),
        ("batch_norm", 200, {"norm": "group"}),
    ],
)
def test_the_planted_cause_is_named_and_the_remedy_with_it(
    name: str, steps: int, remedy: dict[str, object]
) -> None:
    verdict = judged(name, steps)
    assert verdict.cause is EVERY[name].cause
    assert dict(verdict.changes) == remedy
    if name == "attention":
        assert verdict.first_seen.startswith("NaN or Inf was first seen in attention, forward")


@pytest.mark.fault
@pytest.mark.parametrize("name", ["calibration", "sharp_attention"])
def test_nothing_is_blamed_on_a_healthy_training(name: str) -> None:
    verdict = judged(name, 60)
    assert verdict.cause is EVERY[name].cause
    assert not verdict.changes
    assert not verdict.first_seen
