"""A loss whose edge of stability is known in closed form, and the margin we state for it.

On `curvature * w^2 / 2` gradient descent with momentum beta is stable iff the learning rate is
below `2 * (1 + beta) / curvature`: the margin, in doublings that a rate survives, is the number
of powers of two between it and that limit. The question is about stability alone where every
stable rate also learns: so the horizon is long, and no rate is 25 times below the limit.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stability_search import space as spaces
from stability_search.records.trial import Stage
from stability_search.search.plan import StudyPlan
from stability_search.standing import configuration_standings
from tests.search.inline_study import run_all, train

OCTAVES = 3
STEPS = 200
MOMENTA = (0.0, 0.5, 0.9)
MIN_DISTANCE = 0.01  # of every rung from the limit: 200 steps tell 0.99 of it from 1.01 of it
MAX_DOUBLINGS = OCTAVES + 1.5  # from rate to limit; far slower ones learn too little to count

SPACE = """\
name: oracle
task: tests.scenarios.oracle:Quadratic
task_args: {{curvature: {curvature!r}}}
trial: {{steps: {steps}}}
fixed: {{learning_rate: {rate!r}, optimizer: sgd, momentum: {momentum!r}, batch_size: 1}}
confirm: {{top: 1, seeds: 1, steps: {steps}, octaves: {octaves}, min_margin: 0}}
"""


class Weight(nn.Module):
    """One parameter, 1 at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self) -> Tensor:
        return self.w


class Quadratic:
    """Minimise `curvature * w^2 / 2` from w = 1; nothing is random and batches hold nothing."""

    def __init__(self, curvature: float) -> None:
        self.curvature = curvature

    def model(self) -> nn.Module:
        return Weight()

    def batches(self, batch_size: int, _generator: torch.Generator) -> Iterator[Tensor]:
        return itertools.repeat(torch.zeros(batch_size))

    def probe(self) -> Sequence[Tensor]:
        return [torch.zeros(1) for _ in range(4)]

    def loss(self, model: nn.Module, _batch: Tensor) -> Tensor:
        loss: Tensor = self.curvature * model().square() / 2
        return loss

    def baseline(self) -> float:
        return self.curvature / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A quadratic, an optimizer and a stable learning rate.

    Attributes:
        curvature: Second derivative of the loss, > 0.
        momentum: Of gradient descent, in [0, 1).
        ratio: How far the learning rate lies below the limit, > 1.
    """

    curvature: float
    momentum: float
    ratio: float

    @property
    def rate(self) -> float:
        """The learning rate."""
        return 2 * (1 + self.momentum) / self.curvature / self.ratio

    @property
    def margin(self) -> int:
        """The doublings that the learning rate survives, by theory."""
        return math.ceil(math.log2(self.ratio)) - 1


def cases(count: int, *, seed: int) -> list[Case]:
    """Draw quadratics over four decades of curvature, no rung within 1 % of the limit."""
    draw = random.Random(seed)  # noqa: S311 - a sample, no secret
    found: list[Case] = []
    while len(found) < count:
        case = Case(
            curvature=10 ** draw.uniform(-2, 2),
            momentum=MOMENTA[len(found) % len(MOMENTA)],
            ratio=2 ** draw.uniform(0, MAX_DOUBLINGS),
        )
        rungs = [case.ratio / 2**k for k in range(OCTAVES + 1)]
        if all(abs(rung - 1) >= MIN_DISTANCE for rung in rungs):
            found.append(case)
    return found


def stated_margin(case: Case, folder: Path) -> tuple[int, bool]:
    """Run a study of the case, with pilot and ladder, and read what it says.

    Args:
        case: What is trained.
        folder: Where its space file may go.

    Returns:
        The margin and whether it is "at least so much".
    """
    path = folder / "oracle.yaml"
    path.write_text(
        SPACE.format(
            curvature=case.curvature,
            momentum=case.momentum,
            rate=case.rate,
            steps=STEPS,
            octaves=OCTAVES,
        )
    )
    space = spaces.load(path)
    plan = StudyPlan(space, device="cpu")
    rows = run_all(plan, train)
    last = next(row for row in reversed(rows) if row.stage is Stage.CONFIRM)
    standings = configuration_standings(rows, study=space.study, yardstick=plan.measure_of(last))
    own = space.config_id(space.settings({}))
    score = next(one.score for one in standings if one.config_id == own)
    return score.margin_octaves, score.margin_is_capped
