"""Scenario: Adam with its default eps on fp16 parameters, as `model.half()` makes them.

1e-8 is 0 in fp16, and so is the square of a small gradient: 0 / 0. Two protections of the engine
stand before that, and both are taken away by `PureHalf`: it keeps fp32 master weights, and its
fused optimizers compute in fp32 whatever they store. Sign: `nonfinite_parameters` at the first
step. Fix: eps 1e-4, or the engine as it is: fp32 weights with autocast.
"""

from typing import Any

from stability_search.engine import GuardedEngine
from stability_search.engine.losses import LossFn
from stability_search.records.trial import Outcome
from tests.scenarios.running import Evidence, Recipe, Run, run

RECIPE = Recipe(
    task_class="Regression",
    steps=60,
    task_args={"is_half": True},
    engine={"learning_rate": 1e-3, "eps": 1e-8},
)
SAFE_EPS = 1e-4


class PureHalf:
    """Undo, before the first step, what the engine did about half-precision parameters."""

    def before_step(
        self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
    ) -> tuple[list[Any], LossFn]:
        """Cast parameters back and let the optimizer compute in their precision."""
        if step == 1:
            engine.model.half()
            engine.optimizer.state.clear()  # torch makes it again, as half as the parameters
            engine.optimizer.defaults["fused"] = False
            for group in engine.optimizer.param_groups:
                group["fused"] = False
        return window, loss_fn


def scenario(seed: int) -> Evidence:
    """Train pure fp16 at eps 1e-8, then with each fix."""
    broken = run(RECIPE.config(seed), faults=PureHalf())
    fixes = {
        "fp32 weights with autocast": run(
            RECIPE.config(seed, precision="fp16", init_scale=1024.0)
        ),
        f"eps {SAFE_EPS:g}": run(RECIPE.config(seed, eps=SAFE_EPS), faults=PureHalf()),
    }
    in_fp32 = run(RECIPE.config(seed, {"is_half": False}))
    return Evidence(
        seed=seed,
        is_guard_shown=ends_at_once(broken),
        is_sign_absent=not ends_at_once(in_fp32) and in_fp32.has_survived,
        fixes={name: trial.has_survived and trial.has_learned for name, trial in fixes.items()},
        figures=f"{broken.summary.outcome.value} at step {broken.summary.num_steps}",
    )


def ends_at_once(trial: Run) -> bool:
    """Say whether the first step ended the trial for its parameters."""
    return (
        trial.summary.outcome is Outcome.NONFINITE_PARAMETERS
        and trial.summary.num_steps == 1
        and not trial.summary.are_parameters_finite
    )
