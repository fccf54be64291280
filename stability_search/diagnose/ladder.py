"""The ladder: trials of the configuration as given, then of one change each, on the same seeds.

Trials are spent where they decide. Three seeds as given; if any fails, every rung on the first
seed that failed, cut short at its first failure; then the rung that decides, and the remedy, on
the other seeds that failed. If one of them does not hold there, the decision is taken anew.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from stability_search.assembly import initial_model
from stability_search.blind import run_blind
from stability_search.diagnose import rungs as all_rungs
from stability_search.diagnose.batch_statistics import BatchSieve, DataReport
from stability_search.diagnose.ends import (
    Start,
    TrialEnd,
    first_step,
    no_progress_loss,
    watch_trial,
)
from stability_search.diagnose.rungs import LeftOut, Rung, RungName, Variant
from stability_search.diagnose.task_code import task_code
from stability_search.diagnose.verdict import Cause, Evidence, decide, is_mostly_data
from stability_search.engine import GuardedEngine
from stability_search.engine.batches import move
from stability_search.engine.half_weights import keep_no_half_precision
from stability_search.engine.losses import LossFn
from stability_search.errors import InfrastructureError, UsageError, UserCodeError
from stability_search.probe import probe_loss
from stability_search.records.trial import Outcome
from stability_search.records.values import Json
from stability_search.settings.trial import TrialConfig
from stability_search.tasks.base import HasBaseline
from stability_search.tasks.loading import load_task

FIRST_SEEDS = 3
MOST_SEEDS = 5  # where some fail and others do not
FAILING_SEEDS = 2  # that many are looked for among them
PATIENCE = 3  # times the steps, before a training that learns nothing is suspected
SLOWER = 0.05  # of the loss: a rate that ends so far above a higher one is only slower
BLIND_S = 20.0  # seconds that measuring E_0 by a blind run may take
_BLIND_PROBES = 900  # what it costs, in readings of the probe

Say = Callable[[str], None]

_AGAINST_BREAKING = frozenset(
    {
        RungName.ATTENTION_FP32,
        RungName.LOWER_SCALE,
        RungName.SMALLER_MODEL,
        RungName.BATCH_SIZE_1,
    }
)
"""Rungs that keep a training from breaking, and say nothing where it learns nothing."""

_DECIDING = (
    RungName.BATCHES_LEFT_OUT,
    RungName.FP32,
    RungName.ATTENTION_BYPASSED,
    RungName.GROUP_NORM,
    *(rung.name for rung in all_rungs.RATES),
)
"""Rungs that name a cause."""

REMEDIES: dict[Cause, tuple[Rung, ...]] = {
    Cause.MIXED_PRECISION: (
        all_rungs.ATTENTION_FP32,
        all_rungs.LOWER_SCALE,
        all_rungs.BF16,
        all_rungs.FP32,
    ),
    Cause.ATTENTION: (all_rungs.CAP, all_rungs.BYPASSED),
    Cause.LEARNING_RATE: all_rungs.RATES,
    Cause.BATCH_NORM: (all_rungs.GROUP_NORM,),
}


@dataclass(kw_only=True, slots=True)
class RungResult:
    """What one rung showed so far.

    Attributes:
        rung: The rung.
        changes: The settings it changes, as a space file names them.
        left_out: Why it does not apply; empty if it does.
        ends: Its trials so far.
    """

    rung: Rung
    changes: dict[str, Json] = field(default_factory=dict)
    left_out: str = ""
    ends: list[TrialEnd] = field(default_factory=list)


class Ladder:
    """Runs trials and remembers them; what it holds is true at any moment.

    Args:
        config: The configuration as given, with its first seed.
        seeds: Seeds to use, in this order, at least `MOST_SEEDS`.
        data: What its batches look like.
        sieve: Finds the suspicious ones again.
        say: Takes a line per rung.
        check: Called between steps; may raise to stop everything.
    """

    def __init__(  # noqa: PLR0913 - what decides a ladder
        self,
        config: TrialConfig,
        *,
        seeds: Sequence[int],
        data: DataReport,
        sieve: BatchSieve,
        say: Say,
        check: Callable[[], None],
    ) -> None:
        self.config = config
        self.seeds = tuple(seeds)
        self.data = data
        self.is_soft = False
        self.results: dict[RungName, RungResult] = {}
        self.notes: list[str] = []
        self._sieve = sieve
        self._say = say
        self._check = check
        self._no_progress: dict[int, float] = {}
        self._starts: dict[str, Start] = {}

    @property
    def evidence(self) -> Evidence:
        """What has been shown so far."""
        return Evidence(
            as_given=tuple(self._ends(RungName.AS_GIVEN)),
            rungs={name: tuple(result.ends) for name, result in self.results.items()},
            no_progress=dict(self._no_progress),
            data=self.data,
            batch_size=self.config.batch_size,
            is_soft=self.is_soft,
        )

    def climb(self) -> tuple[Cause, RungName | None]:
        """Run what is needed to name the cause, and name it.

        Raises:
            UsageError: Model or device cannot honour the configuration as given.
            UserCodeError: The task failed in the same way with two seeds.
            InfrastructureError: The machine failed.
        """
        self._run_as_given()
        if is_mostly_data(self.evidence):
            return decide(self.evidence)
        if not (self.evidence.failing or self.evidence.has_broken_probe):
            self._look_for_progress()
        if not self.evidence.failing:
            return decide(self.evidence)
        first = self.evidence.failing[0].seed
        if self.data.num_defects and not self.is_soft:
            self.run(all_rungs.LEFT_OUT, first)
        for rung in all_rungs.CHECKLIST:
            if self.is_soft and rung.name in _AGAINST_BREAKING:
                self._leave_out(
                    self.results.setdefault(rung.name, RungResult(rung=rung)),
                    "nothing breaks; it is only asked what learns",
                )
            else:
                self.run(rung, first)
        self._go_deeper(first)
        return self._confirmed()

    def find_remedy(self, cause: Cause) -> RungResult | None:
        """Return the first remedy of a cause that held on every seed that failed; None without."""
        for rung in REMEDIES.get(cause, ()):
            for end in self.evidence.failing:
                self.run(rung, end.seed)
                if not self.evidence.cures(rung.name):
                    break
            if self.evidence.cures(rung.name):
                return self.results[rung.name]
        return None

    # -- the parts of a climb ------------------------------------------------------------------

    def _run_as_given(self) -> None:
        for number, seed in enumerate(self.seeds[:MOST_SEEDS]):
            ends = self._ends(RungName.AS_GIVEN)
            num_failing = sum(end.has_failed for end in ends)
            is_mixed = 0 < num_failing < FAILING_SEEDS
            if number >= FIRST_SEEDS and not is_mixed:
                break
            self.run(all_rungs.AS_GIVEN, seed, cuts_short=number > 0)
            self._require_ran()

    def _require_ran(self) -> None:
        """Raise where the task's own code, or the machine, is what fails."""
        ends = self._ends(RungName.AS_GIVEN)
        last = ends[-1]
        if last.outcome is Outcome.INFRASTRUCTURE:
            raise InfrastructureError(last.error)
        same = [end for end in ends if end.error and end.error_place == last.error_place]
        if last.error_type == "UsageError":
            raise UsageError(last.error.removeprefix("UsageError: "))
        if len(same) > 1 or (len(ends) == FIRST_SEEDS and all(end.error for end in ends)):
            raise UserCodeError(
                f"the task failed with {len(ends)} seeds, {len(same)} in the same way: "
                f"{last.error} ({last.error_place}).",
                hint="Mend the task, then diagnose again.",
            )

    def _look_for_progress(self) -> None:
        """Give a training that learns nothing more steps before it is suspected."""
        if not isinstance(load_task(self.config.task, self.config.task_args), HasBaseline):
            self._measure_blind_run()
        if not all(self.is_stuck(end) for end in self._ends(RungName.AS_GIVEN)):
            return
        seed, times = self.seeds[0], f"{PATIENCE} times the steps"
        rung = Rung(
            name=RungName.LONGER,
            title=f"as given, {times}",
            build=lambda config: Variant(config=all_rungs.longer(config, PATIENCE), changes={}),
        )
        end = self.run(rung, seed)
        if end is None:
            return
        if end.has_failed:
            self.notes.append(f"It holds for {self.config.num_planned_steps} steps, then fails.")
            self.config = all_rungs.longer(self.config, PATIENCE)
            del self.results[RungName.LONGER]
            self.results[RungName.AS_GIVEN].ends = [end]
        elif not self.evidence.has_learned(end):  # as clearly as a cure must: noise falls, too
            self.is_soft = True
        else:
            self.notes.append(
                f"It learned nothing beyond a constant prediction in "
                f"{self.config.num_planned_steps} steps, but did in {times}: slow, not broken."
            )

    def _go_deeper(self, seed: int) -> None:
        """Lower the rate further while a tenth is not enough and nothing else has helped."""
        for rung in all_rungs.DEEPER_RATES:
            evidence = self.evidence
            has_learned = any(
                evidence.has_learned(end)
                for name in _DECIDING
                for end in evidence.rungs.get(name, ())
            )
            if has_learned or not self._may_lower_help(seed):
                return
            self.run(rung, seed)

    def _may_lower_help(self, seed: int) -> bool:
        """Say whether the last rate was no clearly slower than the one above it."""
        names = (RungName.AS_GIVEN, RungName.FP32, *(rung.name for rung in all_rungs.RATES))
        levels = [end.last_level for name in names for end in self._ends(name) if end.seed == seed]
        last = levels[-1]
        above = next((level for level in reversed(levels[:-1]) if level is not None), None)
        return last is None or above is None or last <= above + SLOWER * abs(above)

    def _confirmed(self) -> tuple[Cause, RungName | None]:
        """Decide, and run the deciding rung on every seed that failed until it stands."""
        while True:
            cause, rung = decide(self.evidence)
            if rung is None:
                return cause, None
            tried = {end.seed for end in self._ends(rung)}
            missing = [end.seed for end in self.evidence.failing if end.seed not in tried]
            if not missing:
                return cause, rung
            self.run(self.results[rung].rung, missing[0])

    # -- one trial -----------------------------------------------------------------------------

    def run(self, rung: Rung, seed: int, *, cuts_short: bool = True) -> TrialEnd | None:
        """Run one rung with one seed, unless that was done; None if it does not apply."""
        result = self.results.setdefault(rung.name, RungResult(rung=rung))
        known = [end for end in result.ends if end.seed == seed]
        if known or result.left_out:
            return known[0] if known else None
        variant = all_rungs.apply(rung, replace(self.config, seed=seed))
        if isinstance(variant, LeftOut):
            self._leave_out(result, variant.reason)
            return None
        result.changes = dict(variant.changes)
        start = self._start(variant.config, is_new=not result.ends)
        is_given = rung.name is RungName.AS_GIVEN
        if start.refusal and is_given:
            raise UsageError(start.refusal)
        if (start.refusal or start.error) and not is_given:
            self._leave_out(result, start.refusal or f"it cannot run: {start.error}")
            return None
        end = watch_trial(
            variant.config,
            delta=start.delta,
            cuts_short=cuts_short and rung.name is not RungName.LONGER,
            faults=_Sieved(self._sieve) if rung.name is RungName.BATCHES_LEFT_OUT else None,
            check=self._check,
        )
        result.ends.append(end)
        if is_given:
            self._note_no_progress(end)
        self._say(
            f"{rung.title}: seed {self.number(seed)}: {self.words(end)} ({end.wall_s:.1f} s)"
        )
        return end

    def number(self, seed: int) -> int:
        """Return the number by which people read a seed, from 1."""
        return self.seeds.index(seed) + 1

    def words(self, end: TrialEnd) -> str:
        """Say in a few words how a trial ended."""
        if end.error:
            return f"error: {end.error}"
        if end.has_failed:
            return f"fails at step {end.failed_at}: {end.failure}"
        if end.has_timed_out:
            return f"ran out of time at step {end.num_steps}"
        if self.is_stuck(end):
            return f"holds {end.num_steps} steps, has not learned yet"
        return f"holds {end.num_steps} steps"

    def _leave_out(self, result: RungResult, reason: str) -> None:
        result.left_out = reason
        self._say(f"{result.rung.title}: left out: {reason}")

    def _start(self, config: TrialConfig, *, is_new: bool) -> Start:
        """Return l_0 of a configuration, once per model, batch and seed; and its refusals."""
        key = repr(
            (
                dict(config.task_args),
                config.engine.norm,
                config.engine.init_gain,
                config.batch_size,
                config.seed,
            )
        )
        if is_new or key not in self._starts:
            self._check()
            self._starts[key] = first_step(config)
        return self._starts[key]

    def is_stuck(self, end: TrialEnd) -> bool:
        """Say whether a trial held and learned nothing."""
        return end.is_stuck(self._no_progress.get(end.seed))

    def _note_no_progress(self, end: TrialEnd) -> None:
        task = load_task(self.config.task, self.config.task_args)
        with task_code("baseline()"):
            baseline = float(task.baseline()) if isinstance(task, HasBaseline) else None
        level = no_progress_loss(baseline, end.first_probe)
        if level is not None:
            self._no_progress[end.seed] = level

    def _measure_blind_run(self) -> None:
        """Measure what ignoring the input gives, where the task does not say and it is cheap."""
        config = replace(self.config, seed=self.seeds[0])
        started = time.perf_counter()
        task, device = load_task(config.task, config.task_args), torch.device(config.device)
        probe = [move(batch, device) for batch in task.probe()]
        model = keep_no_half_precision(initial_model(task, seed=config.seed, device=device)).eval()
        with torch.no_grad():
            for batch in probe:
                probe_loss(task, model, batch)
        if (time.perf_counter() - started) * _BLIND_PROBES > BLIND_S:
            self.notes.append(
                "Progress was measured from the untrained model: give the task a `baseline()`, "
                "the probe loss of the best constant prediction, to see a training that learns "
                "nothing more than that."
            )
            return
        blind = run_blind(model, probe, lambda model, batch: probe_loss(task, model, batch))
        for seed, level in list(self._no_progress.items()):
            lower = no_progress_loss(level, blind.loss)
            if lower is not None:
                self._no_progress[seed] = lower

    def _ends(self, name: RungName) -> list[TrialEnd]:
        result = self.results.get(name)
        return [] if result is None else result.ends


class _Sieved:
    """Leaves suspicious batches out of every window."""

    def __init__(self, sieve: BatchSieve) -> None:
        self._sieve = sieve
        self._last_clean: list[Any] = []

    def before_step(
        self,
        step: int,  # noqa: ARG002 - the protocol's
        engine: GuardedEngine,  # noqa: ARG002 - the protocol's
        window: list[Any],
        loss_fn: LossFn,
    ) -> tuple[list[Any], LossFn]:
        """Return the window without what the sieve holds back; the last good one if all is."""
        cpu = torch.device("cpu")
        clean = [batch for batch in window if not self._sieve.faults(move(batch, cpu))]
        self._last_clean = clean or self._last_clean or window
        return self._last_clean, loss_fn
