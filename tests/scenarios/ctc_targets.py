"""Scenario: CTC targets that do not fit into their input.

Eight labels on five frames, or three equal labels on four frames, which need a blank between
each two. Sign: the batch is `data` and nothing is blamed. Fix: `zero_infinity`, or leaving such
clips out.
"""

from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from tests.scenarios.running import Evidence, Recipe, Run, run

DEFECTS = ("long", "repeats")
EVERY = 5
STEPS = 60
RECIPE = Recipe(
    task_class="Transcription",
    steps=STEPS,
    batch_size=4,
    task_args={"defect_every": EVERY},
    engine={"learning_rate": 1e-2, "clip_norm": 1.0},
)


def scenario(seed: int) -> Evidence:
    """Train with every fifth batch defective, then with each fix, then without defect."""
    broken = [run(RECIPE.config(seed, {"defect": defect})) for defect in DEFECTS]
    healthy = run(RECIPE.config(seed))
    fixes = {
        name: [run(RECIPE.config(seed, {"defect": defect, name: True})) for defect in DEFECTS]
        for name in ("zero_infinity", "filters")
    }
    found = "/".join(str(trial.summary.num_data_steps) for trial in broken)
    num_bad = sum(trial.summary.num_bad_steps for trial in broken)
    return Evidence(
        seed=seed,
        is_guard_shown=all(map(blames_the_batches, broken)),
        is_sign_absent=not blames_the_batches(healthy) and healthy.has_survived,
        fixes={
            "filtering" if name == "filters" else name: all(
                trial.has_survived and trial.has_learned and trial.labels == {StepLabel.OK}
                for trial in trials
            )
            for name, trials in fixes.items()
        },
        figures=(
            f"{found} of {STEPS} steps `data` (8 labels on 5 frames/[1,1,1] on 4), {num_bad} bad"
        ),
    )


def blames_the_batches(trial: Run) -> bool:
    """Say whether exactly the defective batches are `data`, and the trial goes on and learns."""
    found = [r.batch_index for r in trial.records if r.label is StepLabel.DATA]
    return (
        trial.summary.outcome is Outcome.COMPLETED
        and trial.summary.num_bad_steps == 0
        and trial.summary.evidence <= 1
        and found == list(range(EVERY - 1, STEPS, EVERY))
        and trial.has_learned
    )
