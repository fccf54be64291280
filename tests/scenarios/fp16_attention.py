"""Scenario: attention logits beyond the largest fp16 number, 65504.

Queries and keys are 64 times as large as they should be and the logits are not divided by the
root of the width. Sign: the forward pass is not finite, `bad`, and a clamp on the output of
attention does not help, since the clamp of NaN is NaN. Fix: bf16, fp32, or a cap on the logits.
"""

from stability_search.records.step import StepLabel
from stability_search.records.trial import Outcome
from tests.scenarios.running import Evidence, Recipe, Run, run

GAIN = 64.0
RECIPE = Recipe(
    task_class="Retrieval",
    steps=40,
    task_args={"gain": GAIN},
    engine={"learning_rate": 1e-3, "clip_norm": 1.0, "attention_modules": ("0",)},
)
FP16 = {"precision": "fp16", "init_scale": 1024.0}
LARGEST = 65504.0


def scenario(seed: int) -> Evidence:
    """Train in fp16 with and without the clamp, then with each fix."""
    broken = [
        run(RECIPE.config(seed, **FP16)),
        run(RECIPE.config(seed, **FP16, attention_clamp=10.0)),
    ]
    fixes = {
        "bf16": run(RECIPE.config(seed, precision="bf16")),
        "fp32": run(RECIPE.config(seed, precision="fp32")),
        "logit cap 30": run(RECIPE.config(seed, **FP16, attention_logit_cap=30.0)),
    }
    healthy = run(RECIPE.config(seed, {"gain": 1.0}, **FP16))
    largest = fixes["bf16"].summary.attention_max or 0.0
    return Evidence(
        seed=seed,
        is_guard_shown=all(map(shows_forward_fault, broken)) and largest > LARGEST,
        is_sign_absent=not shows_forward_fault(healthy) and healthy.has_survived,
        fixes={name: trial.has_survived and trial.has_learned for name, trial in fixes.items()},
        figures=(
            f"killed at step {'/'.join(str(trial.summary.num_steps) for trial in broken)} "
            f"(without/with clamp), logits in bf16 {largest:.3g}"
        ),
    )


def shows_forward_fault(trial: Run) -> bool:
    """Say whether attention's forward pass was named as the cause of `bad` steps."""
    summary = trial.summary
    return (
        summary.outcome is Outcome.PRUNED
        and trial.records[0].label is StepLabel.BAD
        and trial.records[0].scale == trial.records[-1].scale
        and summary.first_nonfinite_phase == "forward"
        and (summary.first_nonfinite_module or "").startswith("0")
    )
