"""Scenario: the learning rate with the lowest training loss is the one that dies later.

The built-in teacher in its original variant, whose attention weights are materialised, in fp16.
Recipe, found by experiment: `input_scale` 100, loss scale from 1024, clip norm 1, micro-batches of
2, two a step, learning rates 6.25e-4 * 2^k. After 200 steps 2.5e-3 has the lowest training loss of
all rates that still live; by step 600 its attention logits have passed 65504 too often. With
`input_scale` 30 nothing below 1e-2 dies, with 200 everything dies within 34 steps.

Sign: the loss at 200 steps picks that rate; S, read at the 600 steps of a confirmation, does not.
S read at 200 steps knows the cliff above by its margin, but not that this rate will die: with some
seeds it picks it, too. So it is the longer horizon of the confirmation that guards here. Fix: half
that rate or less, a cap on the logits, the stable variant, bf16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from stability_search.records.trial import Outcome
from stability_search.settings.trial import TrialConstants
from stability_search.yardstick import probe_steps
from tests.scenarios.ladders import Ladder
from tests.scenarios.running import Evidence, Recipe, Run, run

LOWEST = 6.25e-4
LADDER = (0, 1, 2, 3)  # octaves above it
SHORT, LONG = 200, 600
OCTAVES = 2
RECENT = 50  # steps over which the training loss is averaged
CURES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {  # task, engine
    "logit cap 30": ({}, {"attention_logit_cap": 30.0}),
    "stable variant": ({"variant": "stable"}, {}),
    "bf16": ({}, {"precision": "bf16"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Extent:
    """How much of the scenario is played.

    Attributes:
        short: Steps after which the loss picks.
        long: Steps that the pick must live to.
        ladder: Octaves tried at both.
        cures: Which of `CURES` are tried at the pick.
    """

    short: int = SHORT
    long: int = LONG
    ladder: tuple[int, ...] = LADDER
    cures: tuple[str, ...] = tuple(CURES)


def recipe(steps: int) -> Recipe:
    """Return the training."""
    return Recipe(
        module="stability_search.tasks.teacher",
        task_class="Teacher",
        steps=steps,
        batch_size=2,
        accumulation_steps=2,
        task_args={"variant": "original", "input_scale": 100.0},
        engine={
            "learning_rate": LOWEST,
            "precision": "fp16",
            "init_scale": 1024.0,
            "clip_norm": 1.0,
        },
    )


def rate(octave: int) -> float:
    """Return the learning rate of a rung."""
    return LOWEST * 2.0**octave


def scenario(seed: int, extent: Extent | None = None) -> Evidence:
    """Pick a rate by the loss after the short horizon and by S, and train both for the long."""
    given = extent or Extent()
    pilot = run(
        recipe(given.long).config(seed, precision="fp32", learning_rate=rate(1)),
        TrialConstants(probe_steps=probe_steps(given.short, given.long), measures_blind_run=True),
    )
    short, long = (_ladder(seed, steps, given, pilot) for steps in (given.short, given.long))
    by_loss = picked_by_loss(short, given)
    by_score = picked_by_score(long, given)
    edge, safe = _at(long, by_loss), _at(long, by_score)
    return Evidence(
        seed=seed,
        is_guard_shown=dies(edge) and by_score < by_loss,
        is_sign_absent=not any(
            dies(_at(long, octave)) for octave in given.ladder if octave < by_loss
        ),
        fixes={
            name: trial.summary.outcome is Outcome.COMPLETED and trial.has_learned
            for name, trial in {
                "LR picked by S": safe,
                **_cured(seed, by_loss, given),
            }.items()
        },
        figures=(
            f"loss picks {rate(by_loss):.3g}, {edge.summary.outcome.value} at step "
            f"{edge.summary.num_steps}; S picks {rate(by_score):.3g} at {given.long} steps, "
            f"{rate(picked_by_score(short, given)):.3g} at {given.short}"
        ),
    )


def dies(trial: Run) -> bool:
    """Say whether a trial was killed for non-finite forward passes."""
    return trial.summary.outcome is Outcome.PRUNED and trial.summary.num_bad_steps > 0


def picked_by_loss(ladder: Ladder, extent: Extent) -> int:
    """Return the octave with the lowest recent training loss of those that still live."""
    losses = {
        octave: _recent_loss(_at(ladder, octave))
        for octave in extent.ladder
        if not dies(_at(ladder, octave))
    }
    return min(losses, key=lambda octave: losses[octave])


def picked_by_score(ladder: Ladder, extent: Extent) -> int:
    """Return the octave with the highest S."""
    scores = {
        octave: ladder.standing("original", rate(octave), octaves=OCTAVES).score.score
        for octave in extent.ladder
    }
    return max(scores, key=lambda octave: scores[octave])


def _recent_loss(trial: Run) -> float:
    return fmean(x for x in trial.summary.judged_losses[-RECENT:] if x is not None)


def _at(ladder: Ladder, octave: int) -> Run:
    return ladder.runs["original", rate(octave)]


def _ladder(seed: int, steps: int, extent: Extent, pilot: Run) -> Ladder:
    training = recipe(steps)
    return Ladder(
        horizon=steps,
        pilot={rate(1): pilot},
        runs={
            ("original", rate(octave)): run(training.config(seed, learning_rate=rate(octave)))
            for octave in extent.ladder
        },
    )


def _cured(seed: int, octave: int, extent: Extent) -> dict[str, Run]:
    training = recipe(extent.long)
    cured = {}
    for name in extent.cures:
        task_args, engine = CURES[name]
        config = training.config(seed, task_args, learning_rate=rate(octave), **engine)
        cured[name] = run(config)
    return cured
