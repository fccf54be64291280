"""Trainings with a planted cause, and healthy ones: what `diagnose` must name, and must not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from stability_search.diagnose.ladder import MOST_SEEDS, Ladder
from stability_search.diagnose.session import Verdict, climb, open_ladder
from stability_search.diagnose.verdict import Cause
from stability_search.seeding import derive_seed
from tests.scenarios.running import Recipe

TEACHER = "stability_search.tasks.teacher"
OURS = "tests.diagnose.tasks"
SCENARIOS = "tests.scenarios.tasks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A training and what is wrong with it.

    Attributes:
        title: What was planted.
        cause: What must be named.
        recipe: How it is trained.
    """

    title: str
    cause: Cause
    recipe: Recipe


def teacher(title: str, cause: Cause, engine: Mapping[str, object], **task_args: object) -> Case:
    """Return a case of the built-in teacher, two clips at a time."""
    return Case(
        title=title,
        cause=cause,
        recipe=Recipe(
            module=TEACHER,
            task_class="Teacher",
            steps=120,
            batch_size=2,
            task_args=task_args,
            engine=engine,
        ),
    )


def small(  # noqa: PLR0913 - what decides a training
    title: str,
    cause: Cause,
    task_class: str,
    engine: Mapping[str, object],
    *,
    module: str = OURS,
    batch_size: int = 16,
    steps: int = 200,
    **task_args: object,
) -> Case:
    """Return a case of a task that trains in a blink."""
    return Case(
        title=title,
        cause=cause,
        recipe=Recipe(
            module=module,
            task_class=task_class,
            steps=steps,
            batch_size=batch_size,
            task_args=task_args,
            engine=engine,
        ),
    )


FP16 = {"precision": "fp16", "init_scale": 65536.0}

PLANTED: Mapping[str, Case] = {
    "mixed_precision": teacher(
        "teacher, features x 100, fp16, LR 2e-2",
        Cause.MIXED_PRECISION,
        {**FP16, "learning_rate": 2e-2, "clip_norm": 5.0},
        input_scale=100.0,
    ),
    "attention": small(
        "softmax by hand whose logits grow, fp32, LR 0.2",
        Cause.ATTENTION,
        "Recall",
        {"learning_rate": 0.2},
    ),
    "data": teacher(
        "teacher, 2 % NaN clips, 2 % too short, fp32",
        Cause.DATA,
        {"learning_rate": 1e-3, "clip_norm": 1.0},
        nan_frac=0.02,
        short_frac=0.02,
    ),
    "learning_rate": teacher(
        "teacher, fp32, LR 1", Cause.LEARNING_RATE, {"learning_rate": 1.0, "clip_norm": 5.0}
    ),
    "batch_norm": small(
        "BatchNorm of two samples, fp32, LR 1e-2",
        Cause.BATCH_NORM,
        "Crowd",
        {"learning_rate": 1e-2},
        batch_size=2,
    ),
}
"""One case per cause."""

MORE_PLANTED: Mapping[str, Case] = {
    "logits_in_fp16": small(
        "attention logits beyond 65504, fp16",
        Cause.MIXED_PRECISION,
        "Retrieval",
        {**FP16, "learning_rate": 1e-3, "clip_norm": 1.0, "attention_modules": ("0",)},
        module=SCENARIOS,
        gain=64.0,
    ),
    "spoilt_batches": small(
        "every 20th batch 10,000 times too large, sgd",
        Cause.DATA,
        "Sines",
        {"learning_rate": 3e-2, "optimizer": "sgd"},
        spoilt_every=20,
    ),
    "rate_of_sgd": small(
        "sgd, LR 10: NaN within steps",
        Cause.LEARNING_RATE,
        "Sines",
        {"learning_rate": 10.0, "optimizer": "sgd"},
    ),
    "rate_without_nan": small(
        "transformer, LR 2^1: diverges without NaN",
        Cause.LEARNING_RATE,
        "Grammar",
        {"learning_rate": 2.0, "beta2": 0.95, "warmup_steps": 20, "clip_norm": 1.0},
        module=SCENARIOS,
    ),
}

HEALTHY: Mapping[str, Case] = {
    "teacher_fp16": teacher(
        "teacher, fp16, LR 1e-3",
        Cause.HEALTHY,
        {**FP16, "learning_rate": 1e-3, "clip_norm": 1.0},
    ),
    "teacher_stable": teacher(
        "teacher, stable variant, bf16, LR 2e-3",
        Cause.HEALTHY,
        {"precision": "bf16", "learning_rate": 2e-3, "clip_norm": 1.0},
        variant="stable",
    ),
    "teacher_slow": teacher(
        "teacher, fp32, LR 1e-5: slow", Cause.HEALTHY, {"learning_rate": 1e-5, "clip_norm": 0.5}
    ),
    "teacher_plateau": teacher(
        "teacher, fp32, LR 2e-4: on the plateau",
        Cause.HEALTHY,
        {"learning_rate": 2e-4, "clip_norm": 1.0},
    ),
    "calibration": small(
        "MLP, fp16, init_scale 2^24: only calibration",
        Cause.HEALTHY,
        "Sines",
        {"precision": "fp16", "init_scale": 2.0**24, "learning_rate": 1e-2},
    ),
    "transformer": small(
        "transformer, LR 2^-8",
        Cause.HEALTHY,
        "Grammar",
        {"learning_rate": 2.0**-8, "beta2": 0.95, "warmup_steps": 20, "clip_norm": 1.0},
        module=SCENARIOS,
    ),
    "batch_norm_of_16": small(
        "BatchNorm of 16 samples", Cause.HEALTHY, "Crowd", {"learning_rate": 1e-2}
    ),
    "sharp_attention": small(
        "softmax by hand, LR 1e-2", Cause.HEALTHY, "Recall", {"learning_rate": 1e-2}
    ),
}


def judge(
    case: Case, seed: int, say: Callable[[str], None] = lambda _: None
) -> tuple[Verdict, Ladder]:
    """Diagnose a case under a study seed, as the command does."""
    seeds = [derive_seed(seed, "diagnose", k) for k in range(MOST_SEEDS)]
    ladder = open_ladder(case.recipe.config(seeds[0]), seeds=seeds, say=say, check=lambda: None)
    return climb(ladder), ladder
