"""What is raced on: a task, a space to search, and a grid that covers it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stability_search.records.values import Json
from stability_search.space import Space, load

EVALUATION_FACTOR = 5  # a choice is trained for so many confirm horizons

_COMMON = """\
search: {trials: 24, sampler: tpe, max_concurrent: 1}
confirm: {top: 3, seeds: 5, steps: CONFIRM_STEPS, octaves: 3, min_margin: 1}
"""

_EDGE = """\
name: edge
task: teacher
task_args: {variant: original, input_scale: 100.0}
trial: {steps: 100, timeout_s: 3600}
fixed: {batch_size: 2, accumulation_steps: 2, init_scale: 1024.0, clip_norm: 1.0}
space:
  learning_rate: {loguniform: {low: 1e-4, high: 0.04}}
  precision: {choice: [fp16, bf16]}
  attention_logit_cap: {choice: [null, 30.0]}
start_with:
  - {learning_rate: 2.5e-3, precision: fp16, attention_logit_cap: null}
"""

_ATTENTION = """\
name: attention
task: tests.scenarios.tasks:Grammar
trial: {steps: 100, timeout_s: 3600}
fixed: {batch_size: 16, beta2: 0.95, warmup_steps: 20}
space:
  learning_rate: {loguniform: {low: 6.103515625e-05, high: 1.0}}
  attention_logit_cap: {choice: [null, 30.0]}
  clip_norm: {choice: [null, 1.0]}
start_with:
  - {learning_rate: 0.015625, attention_logit_cap: null, clip_norm: null}
"""

_OWN = """\
name: own
task: tests.benchmarks.race.tasks:HeavyTails
trial: {steps: 100, timeout_s: 3600}
fixed: {batch_size: 16, optimizer: sgd}
space:
  learning_rate: {loguniform: {low: 1e-4, high: 1.0}}
  momentum: {choice: [0.0, 0.9]}
  clip_norm: {choice: [null, 10.0]}
start_with:
  - {learning_rate: 0.01, momentum: 0.9, clip_norm: null}
"""

_TEACHER = """\
name: teacher
task: teacher
task_args: {variant: original, input_scale: 100.0, nan_frac: 0.005, short_frac: 0.005}
trial: {steps: 100, timeout_s: 3600}
fixed: {batch_size: 2, accumulation_steps: 2}
space:
  learning_rate: {loguniform: {low: 1e-6, high: 0.25}}
  precision: {choice: [fp32, bf16, fp16]}
  init_scale: {choice: [1024, 65536, 16777216], when: {precision: fp16}}
  clip_norm: {choice: [null, 0.5, 1.0, 5.0, 10.0]}
  attention_logit_cap: {choice: [null, 30.0]}
start_with:
  - learning_rate: 2e-4
    precision: fp16
    init_scale: 65536
    clip_norm: 5.0
    attention_logit_cap: null
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One task to race on.

    Attributes:
        name: Its name.
        text: Its space file.
        confirm_steps: Horizon of confirm, and of every trial of a rival.
        grid: Values of every setting that varies; combined in all ways, except that a setting
            without meaning is left out.
        study_seeds: Study seeds that are raced by default.
    """

    name: str
    text: str
    confirm_steps: int
    grid: Mapping[str, Sequence[Json]]
    study_seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def evaluation_steps(self) -> int:
        """Horizon of the grid and of the evaluation of every choice."""
        return EVALUATION_FACTOR * self.confirm_steps

    def space(self, seed: int, folder: Path) -> Space:
        """Load the space of one study.

        Args:
            seed: The study's seed.
            folder: Where its file is written.
        """
        common = _COMMON.replace("CONFIRM_STEPS", str(self.confirm_steps))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}-{seed}.yaml"
        path.write_text(f"{self.text}seed: {seed}\n{common}")
        return load(path)

    def grid_settings(self, space: Space) -> Iterator[dict[str, Json]]:
        """List every configuration of the grid once."""
        seen = set()
        for values in itertools.product(*self.grid.values()):
            settings = space.settings(dict(zip(self.grid, values, strict=True)))
            config_id = space.config_id(settings)
            if config_id not in seen:
                seen.add(config_id)
                yield settings


def _octaves(low: float, count: int) -> tuple[float, ...]:
    return tuple(low * 2.0**k for k in range(count))


TRACKS: Mapping[str, Track] = {
    track.name: track
    for track in (
        Track(
            name="own",
            text=_OWN,
            confirm_steps=200,
            grid={
                "learning_rate": _octaves(2.0**-11, 11),
                "momentum": (0.0, 0.9),
                "clip_norm": (None, 10.0),
            },
        ),
        Track(
            name="attention",
            text=_ATTENTION,
            confirm_steps=200,
            grid={
                "learning_rate": _octaves(2.0**-13, 11),
                "attention_logit_cap": (None, 30.0),
                "clip_norm": (None, 1.0),
            },
        ),
        Track(
            name="edge",
            text=_EDGE,
            confirm_steps=120,
            grid={
                "learning_rate": _octaves(3.125e-4, 7),
                "precision": ("fp16", "bf16"),
                "attention_logit_cap": (None, 30.0),
            },
        ),
        Track(
            name="teacher",
            text=_TEACHER,
            confirm_steps=120,
            grid={
                "learning_rate": _octaves(2e-4, 8),
                "precision": ("bf16", "fp16"),
                "init_scale": (65536,),
                "clip_norm": (1.0,),
                "attention_logit_cap": (None, 30.0),
            },
            study_seeds=(0,),
        ),
    )
}
