"""Scenario: an fp16 loss scale that starts far too high.

Sign: one overflow per halving until the scale fits, all `calibration`, none held against the
configuration. Fix: start at 2^16 to 2^18.
"""

import math

from stability_search.pruning import KillTest
from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from stability_search.settings.trial import KillRule
from tests.scenarios.running import Evidence, Recipe, Run, run

RECIPE = Recipe(
    task_class="Regression",
    steps=80,
    batch_size=64,
    task_args={"loss_weight": 2.0**-4},
    engine={"learning_rate": 1e-3, "precision": "fp16"},
)
TOO_HIGH = (24, 32, 40)
SOUND = (16, 17, 18)
SETTLED = (17, 18, 19)  # log2 of the scale that the search ends at
FEW = 1  # overflows that a sound first scale may have


def scenario(seed: int) -> Evidence:
    """Start at 2^24, 2^32 and 2^40, then at 2^16 to 2^18."""
    high = {power: run(RECIPE.config(seed, init_scale=2.0**power)) for power in TOO_HIGH}
    sound = {power: run(RECIPE.config(seed, init_scale=2.0**power)) for power in SOUND}
    found = "/".join(str(trial.summary.num_calibration_steps) for trial in high.values())
    settled = sorted({_settled(trial) for trial in high.values()})
    return Evidence(
        seed=seed,
        is_guard_shown=all(
            shows_calibration(trial) and trial.summary.num_calibration_steps == power - settled_at
            for power, trial in high.items()
            for settled_at in [_settled(trial)]
        ),
        is_sign_absent=not any(shows_calibration(trial) for trial in sound.values()),
        fixes={
            "init_scale 2^16 to 2^18": all(
                trial.has_survived
                and trial.has_learned
                and trial.summary.num_calibration_steps <= FEW
                for trial in sound.values()
            )
        },
        figures=f"{found} overflows, settled at 2^{'/'.join(map(str, settled))}",
    )


def shows_calibration(trial: Run) -> bool:
    """Say whether a trial searched long for its scale, found it, and was not blamed."""
    return (
        trial.summary.outcome is Outcome.COMPLETED
        and trial.labels == {StepLabel.OK, StepLabel.CALIBRATION}
        and trial.summary.num_calibration_steps > FEW
        and _settled(trial) in SETTLED
        and trial.has_learned
    )


def killed_at_if_every_overflow_counted(trial: Run) -> int | None:
    """Feed the kill rule what it would hear without labels.

    Returns:
        The step at which it would end the trial; None if never.
    """
    rule = KillTest(KillRule(), RECIPE.steps)
    for record in trial.records:
        if rule.update(is_bad=not record.is_grad_finite):
            return record.step
    return None


def _settled(trial: Run) -> int:
    return round(math.log2(trial.summary.final_scale or 1.0))
