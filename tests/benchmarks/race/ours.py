"""Our study, driven in this process with one slot: no Ray, and every trial from the store."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stability_search.records.trial import Stage, TrialRow
from stability_search.records.values import Json
from stability_search.search.plan import StudyPlan
from stability_search.space import Space
from stability_search.standing import LADDER_SEEDS
from tests.benchmarks.race.store import Store, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What one method did with one study seed.

    Attributes:
        method: Its name.
        seed: Study seed.
        choice: Settings it chose; None where it chose nothing.
        note: Why there is no choice, or another word on it.
        trials: Trials it launched.
        steps: Optimizer steps these executed.
        train_s: Seconds they took, on one core.
        parts: Steps by stage, and of confirm by kind; ours only.
        fastest: Settings of the fastest that meets the bar; ours only.
    """

    method: str
    seed: int
    choice: Mapping[str, Json] | None
    note: str = ""
    trials: int
    steps: int
    train_s: float
    parts: Mapping[str, int] = field(default_factory=dict)
    fastest: Mapping[str, Json] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def run_study(space: Space, store: Store) -> Finished:
    """Run a whole study until its verdict.

    Args:
        space: The study's space.
        store: Where trials come from.
    """
    plan = StudyPlan(space, device="cpu")
    while (request := plan.next_trial()) is not None:
        training = Training(config=request.config, constants=request.constants)
        plan.finish(request, store.run(training), started_at="", node="")
    verdict = plan.verdict
    if verdict is None:
        raise AssertionError("the plan neither asks for a trial nor ends")
    settings = {row.config_id: row.settings for row in plan.rows}
    word = verdict.kind.value
    if verdict.choice_reason is not None:
        word += f", {verdict.choice_reason.value}"
    missed = f" (closest missed: {'; '.join(verdict.missed)})" if verdict.missed else ""
    return Finished(
        method="ours",
        seed=space.study.seed,
        choice=None if verdict.choice is None else settings[verdict.choice],
        note=f"{word}. {verdict.reason}{missed}".strip(),
        trials=len(plan.rows),
        steps=sum(row.summary.num_steps for row in plan.rows),
        train_s=sum(row.summary.wall_s for row in plan.rows),
        parts=steps_by_part(plan.rows, num_seeds=space.study.confirm.seeds),
        fastest=None if verdict.fastest is None else settings[verdict.fastest],
    )


def steps_by_part(rows: list[TrialRow], *, num_seeds: int) -> dict[str, int]:
    """Add up executed steps by stage and, within confirm, by what they were run for.

    Args:
        rows: Every row of a study.
        num_seeds: Seeds of the first look.
    """
    parts: Counter[str] = Counter()
    for row in rows:
        parts[row.stage.value] += row.summary.num_steps
        if row.stage is Stage.CONFIRM:
            parts[f"confirm: {_kind(row, num_seeds)}"] += row.summary.num_steps
    return dict(parts)


def _kind(row: TrialRow, num_seeds: int) -> str:
    octave = row.octave or 0
    if row.seed_index >= num_seeds:
        return "second look"
    if row.seed_index >= LADDER_SEEDS:
        return "filled seeds"
    if octave == 0:
        return "base pair"
    return "rungs above" if octave > 0 else "rungs below"
