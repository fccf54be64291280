"""Scenario: a learning rate so high that the loss explodes, and stays finite all the while.

Sign: the loss stop ends the trial as `diverged` at step 70, the earliest it may. Fix: a lower
learning rate.
"""

from stability_search.records.trial import Outcome
from tests.scenarios.attention_growth import recipe
from tests.scenarios.ladders import constants_after
from tests.scenarios.running import Evidence, Run, run

STEPS = 100
EARLIEST = 70
FAULTS = (0, 2, 4)  # log2 of the learning rates
SOUND = -8


def scenario(seed: int) -> Evidence:
    """Take the yardstick from a sound run, then train at 2^0, 2^2 and 2^4."""
    training = recipe(STEPS)
    pilot = run(training.config(seed, learning_rate=2.0**SOUND))
    constants = constants_after({2.0**SOUND: pilot}, STEPS)
    broken = [run(training.config(seed, learning_rate=2.0**power), constants) for power in FAULTS]
    fixed = run(training.config(seed, learning_rate=2.0**SOUND), constants)
    losses = [max(loss or 0.0 for loss in trial.summary.judged_losses) for trial in broken]
    steps = "/".join(str(trial.summary.num_steps) for trial in broken)
    return Evidence(
        seed=seed,
        is_guard_shown=all(map(is_stopped_by_its_loss, broken)),
        is_sign_absent=not is_stopped_by_its_loss(fixed),
        fixes={f"LR 2^{SOUND}": fixed.has_survived and fixed.has_learned},
        figures=(
            f"diverged at step {steps}, largest loss {'/'.join(f'{x:.3g}' for x in losses)}, "
            "none non-finite"
        ),
    )


def is_stopped_by_its_loss(trial: Run) -> bool:
    """Say whether the loss stop ended the trial at the earliest step, every loss being finite."""
    return (
        trial.summary.outcome is Outcome.DIVERGED
        and trial.summary.num_steps == EARLIEST
        and None not in trial.summary.judged_losses
        and trial.summary.num_bad_steps == 0
    )
