"""Every training of the race is run once: on the CPU it is the same to the bit each time.

A training is kept in a file named by what decides it: its configuration, its constants and the
sources of engine, trial and tasks, comments and docstrings left out. Two processes may use one
store; a training that both run at once is written twice, with the same content. Seconds are
those of the process on its core, so that a busy machine does not change them.
"""

import ast
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from stability_search.engine import GuardedEngine
from stability_search.engine.losses import LossFn
from stability_search.records.trial import Outcome, TrialSummary
from stability_search.settings.trial import TrialConfig, TrialConstants
from stability_search.trial import NoFaults, run_trial

_ROOT = Path(__file__).resolve().parents[3]
_SOURCES = (
    "stability_search/engine/*.py",
    "stability_search/tasks/*.py",
    "stability_search/[abpst]*.py",
    "tests/scenarios/tasks.py",
    "tests/benchmarks/race/tasks.py",
)
# Of the top level: what decides a training. Scores and tables do not.
_TOP_LEVEL = {"assembly", "blind", "probe", "pruning", "seeding", "tally", "trial"}
_TRANSIENT = {Outcome.TIMED_OUT, Outcome.INFRASTRUCTURE, Outcome.OUT_OF_MEMORY}


@cache
def fingerprint() -> str:
    """Hash the code that trains; the same for every formatting of it."""
    digest = hashlib.sha256()
    package = _ROOT / "stability_search"
    for path in sorted(path for pattern in _SOURCES for path in _ROOT.glob(pattern)):
        if path.parent == package and path.stem not in _TOP_LEVEL:
            continue
        tree = _Bare().visit(ast.parse(path.read_text(encoding="utf-8")))
        digest.update(f"{path.relative_to(_ROOT)}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


class _Bare(ast.NodeTransformer):
    """Drops docstrings."""

    def visit(self, node: ast.AST) -> Any:  # noqa: ANN401 - the base class's
        self.generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:]  # type: ignore[attr-defined]
        return node


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training: what to train, and what is fixed for it."""

    config: TrialConfig
    constants: TrialConstants

    @property
    def key(self) -> str:
        """Hash of everything that decides it but the code."""
        facts = {"config": _facts(self.config), "constants": _facts(self.constants)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"config": self.config.to_json(), "constants": asdict(self.constants)}


def _facts(value: Any) -> Any:  # noqa: ANN401 - any field
    """Leave out what has its default: a setting that is new tomorrow changes no key."""
    if not is_dataclass(value):
        return value
    given = {}
    for field in fields(value):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        one = getattr(value, field.name)
        if default is MISSING or one != default:
            given[field.name] = _facts(one)
    return given


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a user's script would report after a tenth of its steps.

    Attributes:
        step: Steps so far.
        loss: Probe loss; NaN where it is not finite.
        wall_s: Seconds of the process so far.
        is_last: True if none comes after it.
    """

    step: int
    loss: float
    wall_s: float
    is_last: bool = False


class Store:
    """Trainings that were run.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_run = 0
        self.num_steps_run = 0

    def run(self, training: Training) -> TrialSummary:
        """Return how a training ends, running it only if it is not known."""
        path = self._path(training, "trial")
        if (data := read_json(path)) is not None:
            return TrialSummary.from_json(data["summary"])
        summary = self.train(training)
        if summary.outcome not in _TRANSIENT:
            write_json(path, {**training.to_json(), "summary": summary.to_json()})
        return summary

    def train(self, training: Training) -> TrialSummary:
        """Run a training, known or not, and keep nothing of it."""
        steps = run_trial(training.config, constants=training.constants, clock=time.process_time)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                summary: TrialSummary = end.value
                break
        self._count(summary.num_steps)
        if summary.outcome is Outcome.USER_ERROR:
            raise RuntimeError(f"the race's own task failed: {summary.error_text}")
        return summary

    def follow(self, training: Training) -> Iterator[Reading]:
        """Give the probe readings after step 0 of a training one by one, as it reaches them.

        Whoever stops asking stops the training there. One that the engine had to end reads NaN
        from then on, once.
        """
        path = self._path(training, "readings")
        kept = read_json(path) or {"is_complete": False, "readings": []}
        known = [
            Reading(
                step=step,
                loss=math.nan if loss is None else loss,
                wall_s=wall_s,
                is_last=kept["is_complete"] and number == len(kept["readings"]),
            )
            for number, (step, loss, wall_s) in enumerate(kept["readings"], start=1)
        ]
        yield from known
        if kept["is_complete"]:
            return
        seen: list[Reading] = []
        is_complete = False
        try:
            for reading in _live(training):
                seen.append(reading)
                is_complete = reading.is_last
                if len(seen) > len(known):
                    yield reading
        finally:
            self._count(seen[-1].step if seen else 0)
            if is_complete or len(seen) > len(known):
                rows = [
                    (r.step, r.loss if math.isfinite(r.loss) else None, r.wall_s) for r in seen
                ]
                write_json(
                    path,
                    {**training.to_json(), "is_complete": is_complete, "readings": rows},
                )

    def note_path(self, *parts: str) -> Path:
        """Return where a result of the race is kept that depends on the code that trains."""
        return self.folder.joinpath(fingerprint(), *parts)

    def _count(self, num_steps: int) -> None:
        self.num_run += 1
        self.num_steps_run += num_steps

    def _path(self, training: Training, kind: str) -> Path:
        return self.note_path(kind, f"{training.key}.json")


def read_json(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    """Read a file of the store; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_json(path: Path, value: object) -> None:
    """Write a file of the store whole: another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    part.replace(path)


class _Listener(NoFaults):
    """Hears every probe reading of a training as it is made."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def before_step(
        self, step: int, engine: GuardedEngine, window: list[Any], loss_fn: LossFn
    ) -> tuple[list[Any], LossFn]:
        if step == 1:  # the reading at step 0 has been made
            evaluate = engine.evaluate

            def heard(probe: Sequence[Any], loss: LossFn) -> Sequence[float | None]:
                losses = evaluate(probe, loss)
                finite = [one for one in losses if one is not None and math.isfinite(one)]
                self.losses.append(fmean(finite) if len(finite) == len(losses) else math.nan)
                return losses

            engine.evaluate = heard  # type: ignore[method-assign,assignment]
        return window, loss_fn


def _live(training: Training) -> Iterator[Reading]:
    """Train, and give every reading after step 0 once it has been made."""
    began = time.process_time()
    listener = _Listener()
    steps = run_trial(
        training.config, constants=training.constants, faults=listener, clock=time.process_time
    )
    num_steps, num_given = 0, 0
    is_running = True
    while is_running:
        try:
            num_steps_before = num_steps
            num_steps = next(steps).record.step
        except StopIteration as end:
            summary: TrialSummary = end.value
            num_steps_before = summary.num_steps
            is_running = False
            if summary.outcome is Outcome.USER_ERROR:
                raise RuntimeError(summary.error_text) from None
            if summary.outcome is not Outcome.COMPLETED:
                listener.losses.append(math.nan)
        if len(listener.losses) > num_given:
            num_given += 1
            loss = listener.losses[num_given - 1]
            yield Reading(
                step=num_steps_before,
                loss=loss,
                wall_s=time.process_time() - began,
                is_last=not is_running,
            )
