"""From the ladder to a verdict in plain words: the cause, the setting to change, how sure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stability_search.diagnose.batch_statistics import DataReport, DefectKind
from stability_search.diagnose.ends import TrialEnd
from stability_search.diagnose.ladder import Ladder, RungResult
from stability_search.diagnose.rungs import RATES, RungName
from stability_search.diagnose.verdict import Cause, Evidence, blames_code
from stability_search.records.values import Json

_NEEDED_FOR = {  # rungs that decide nothing when they hold, but are worth knowing of
    RungName.AS_GIVEN,
    RungName.LONGER,
}
_UNTRIED = {
    Cause.ATTENTION: (
        "Also known to help, not tried here: fewer heads, attention dropout of 0.3, the norm "
        "before attention."
    ),
    Cause.LEARNING_RATE: "Also known to help, not tried here: warm-up, a lower clip_norm.",
    Cause.BATCH_NORM: "Also known to help, not tried here: a larger batch, where memory allows.",
    Cause.DATA: (
        "Mend or leave out these samples. The guarded engine skips them; plain training breaks."
    ),
}


_NO_MODULE = {"backward": "a gradient", "update": "a parameter"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a diagnosis says.

    Attributes:
        cause: The one word.
        headline: The same in one sentence.
        changes: Settings to change, as a space file names them; empty where there is none.
        remedy: What they do, in a few words; empty likewise.
        sureness: On how many seeds it failed, and on how many the cure held.
        first_seen: Where NaN or Inf was first seen; empty where it was not.
        also_helped: What else would have helped, in a few words each.
        notes: What a reader must know beside it, one sentence each.
    """

    cause: Cause
    headline: str
    changes: Mapping[str, Json] = field(default_factory=dict)
    remedy: str = ""
    sureness: str = ""
    first_seen: str = ""
    also_helped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def conclude(
    ladder: Ladder, cause: Cause, decided_by: RungName | None, remedy: RungResult | None
) -> Verdict:
    """Word the verdict of a ladder that was climbed to its end."""
    evidence = ladder.evidence
    failing = evidence.failing
    name = remedy.rung.name if remedy else None
    return Verdict(
        cause=cause,
        headline=_headline(ladder, cause, decided_by),
        changes=dict(remedy.changes) if remedy else {},
        remedy=remedy.rung.title if remedy else "",
        sureness=_sureness(evidence, decided_by, remedy),
        first_seen=first_seen(failing),
        also_helped=_also_helped(ladder, {decided_by, name}),
        notes=tuple(_notes(ladder, cause)),
    )


def incomplete(ladder: Ladder | None, reason: str) -> Verdict:
    """Word what is known where the ladder was not climbed to its end."""
    failing = ladder.evidence.failing if ladder else []
    return Verdict(
        cause=Cause.INCOMPLETE, headline=f"Incomplete: {reason}", first_seen=first_seen(failing)
    )


def first_seen(failing: Sequence[TrialEnd]) -> str:
    """Say where NaN or Inf was first seen; empty where no module is known."""
    end = next((end for end in failing if end.phase is not None), None)
    if end is None:
        return ""
    place = _place_words(end.module, end.phase)
    text = f"NaN or Inf was first seen in {place}, {end.phase} pass of step {end.failed_at}"
    if end.phase in {"loss", "update"}:
        text = f"NaN or Inf was first seen in {place} ({end.phase}) at step {end.failed_at}"
    if end.last_finite_max is not None:
        text += f"; the largest value that went in was {end.last_finite_max:.3g}"
    return f"{text}. First seen there, not necessarily caused there."


def _headline(  # noqa: PLR0911 - a sentence per cause
    ladder: Ladder, cause: Cause, decided_by: RungName | None
) -> str:
    given = ladder.config
    evidence = ladder.evidence
    steps, precision = given.num_planned_steps, given.engine.precision
    fails = "learns nothing" if evidence.is_soft else "fails"
    match cause:
        case Cause.MIXED_PRECISION:
            return f"Mixed precision: in {precision} it {fails}, in fp32 it holds."
        case Cause.ATTENTION:
            return f"Attention: without it the training holds; {_fp32_words(ladder, fails)}."
        case Cause.LEARNING_RATE:
            rung = next(rung for rung in RATES if rung.name is decided_by)
            rate = ladder.results[rung.name].changes["learning_rate"]
            return (
                f"The learning rate: at {given.engine.learning_rate:g} it {fails}, at {rate:g} "
                f"it holds; {_fp32_words(ladder, fails)}."
            )
        case Cause.BATCH_NORM:
            return (
                f"BatchNorm at batch size {given.batch_size}: with GroupNorm it holds; "
                "neither fp32 nor a lower rate helps."
            )
        case Cause.DATA:
            return _data_headline(ladder, decided_by)
        case Cause.HEALTHY:
            num_held = sum(not (end.error or end.has_timed_out) for end in evidence.as_given)
            seeds = f"{num_held} of {len(evidence.as_given)} seeds"
            return f"Healthy: {seeds} held {steps} steps; nothing is blamed."
        case _:
            return _not_found(evidence, fails)


def _not_found(evidence: Evidence, fails: str) -> str:
    ends = evidence.as_given
    if blames_code(evidence):
        num_broken = sum(end.num_reference_steps for end in ends)
        place = next((end.reference_place for end in ends if end.reference_place), None)
        where = "" if place is None else f" (first seen in {_place_words(*place)})"
        return (
            f"Not found: {num_broken} of {sum(end.num_steps for end in ends)} steps were "
            "non-finite (NaN or Inf) with finite batches, for the untrained model in fp32 too: "
            f"look at the task's loss and model{where}, not at the data or a setting."
        )
    if not evidence.failing:
        broken = [end for end in ends if end.is_probe_broken]
        since = "before the first step already"
        since = "at the end" if any(end.first_probe is not None for end in broken) else since
        return (
            f"Not found: training is finite, but on {len(broken)} of {len(ends)} seeds the probe "
            f"loss is NaN or Inf, {since}: look at what model and loss do in eval mode (running "
            "statistics, a branch on `training`) and at the held-out batches."
        )
    return f"Not found: it {fails}, and nothing on the ladder cures it."


def _place_words(module: str | None, phase: str | None) -> str:
    if module is not None:
        return module or "the model itself"
    return _NO_MODULE.get(phase or "", "the loss")


def _fp32_words(ladder: Ladder, fails: str) -> str:
    if ladder.config.engine.precision == "fp32":
        return "it trains in fp32 already"
    return f"in fp32 it {fails} as well"


def _data_headline(ladder: Ladder, decided_by: RungName | None) -> str:
    if decided_by is RungName.BATCHES_LEFT_OUT:
        return "The data: with the suspicious batches left out it holds."
    ends = ladder.evidence.as_given
    num_steps, num_data = (
        sum(values)
        for values in zip(*((end.num_steps, end.num_data_steps) for end in ends), strict=True)
    )
    if _is_probe_alone(ladder.evidence):
        return "The data: a probe batch holds NaN or Inf (see the data); training is finite."
    if not num_data:
        return "The data: some samples cannot be learned from; nothing else fails."
    reason = next(end.data_reason for end in ends if end.data_reason)
    text = f"The data: {num_data} of {num_steps} steps broke for their batch ({reason})"
    batches = next((end.data_batches for end in ends if end.data_batches), ())
    listed = ", ".join(map(str, batches))
    return f"{text}, with the first seed at micro-batch {listed}." if listed else f"{text}."


def _is_probe_alone(evidence: Evidence) -> bool:
    """Say whether the held-out batches alone are at fault."""
    has_bad_steps = any(end.num_data_steps for end in evidence.as_given)
    is_misfit = evidence.data.has(DefectKind.MISFIT)
    return evidence.has_broken_probe and not (has_bad_steps or is_misfit or evidence.failing)


def _sureness(evidence: Evidence, decided_by: RungName | None, remedy: RungResult | None) -> str:
    num_given, num_failing = len(evidence.as_given), len(evidence.failing)
    if not num_failing:
        return ""
    verb = "learned nothing" if evidence.is_soft else "failed"
    text = f"As given it {verb} on {num_failing} of {num_given} seeds"
    for name, what in (
        (decided_by, "the deciding rung"),
        (remedy.rung.name if remedy else None, "the remedy"),
    ):
        if name is not None and (what != "the remedy" or name is not decided_by):
            ends = evidence.rungs[name]
            text += f"; {what} held on {len(ends)} of {len(ends)} of them"
    return f"{text}."


def _also_helped(ladder: Ladder, told: set[RungName | None]) -> tuple[str, ...]:
    evidence = ladder.evidence
    return tuple(
        f"{result.rung.title} ({len(result.ends)} of {len(evidence.failing)} seeds tried)"
        for name, result in ladder.results.items()
        if name not in told | _NEEDED_FOR and evidence.failing and evidence.cures(name)
    )


def _notes(ladder: Ladder, cause: Cause) -> list[str]:
    evidence = ladder.evidence
    notes = list(ladder.notes)
    if cause is Cause.DATA and _is_probe_alone(evidence):
        notes.append("Mend or leave out these probe batches: nothing can be judged by them.")
    elif cause in _UNTRIED:
        notes.append(_UNTRIED[cause])
    if cause is Cause.MIXED_PRECISION and ladder.data.hints:
        notes.append(
            "Also known to help, where the field named below is an input and not a target: mean 0 "
            "and deviation 1."
        )
    num_data = sum(end.num_data_steps for end in evidence.as_given)
    if num_data and cause is not Cause.DATA and not blames_code(evidence):
        notes.append(f"Besides, {num_data} steps broke for their batch alone: see the data below.")
    notes += [f"One seed ended in the task: {end.error}" for end in evidence.as_given if end.error]
    late = [end for end in evidence.as_given if end.has_timed_out]
    if late:
        notes.append(
            f"{len(late)} seeds ran out of time (trial.timeout_s), the first at step "
            f"{late[0].num_steps}."
        )
    slow = [end for end in evidence.as_given if end.is_stuck(evidence.no_progress.get(end.seed))]
    if cause is Cause.HEALTHY and slow and not ladder.notes:
        notes.append(_slow_note(len(slow), evidence))
    if cause is Cause.HEALTHY:
        notes.append("It says nothing of later steps: raise trial.steps to look further.")
    return notes


def _slow_note(num_slow: int, evidence: Evidence) -> str:
    """Say on how many seeds nothing was learned, and what to do."""
    given = evidence.as_given
    text = (
        f"It does not break, but on {num_slow} of {len(given)} seeds it learned nothing beyond a "
        "constant prediction within these steps: train longer (trial.steps), raise the rate"
    )
    if any(map(evidence.has_learned, given)):  # so the targets can be told from the inputs
        return (
            f"{text}, or ask what differs between the seeds (initial weights, order of batches)."
        )
    return f"{text}, or ask whether the targets can be told from the inputs at all."


def data_summary(data: DataReport) -> list[str]:
    """Say in a line each what the batches look like; hints and defects with them."""
    lines = [
        f"{data.num_training_batches} training and {data.num_probe_batches} probe batches read"
    ]
    lines += [
        f"{number} {'batch' if number == 1 else 'batches'} {_DEFECT_WORDS[kind]}"
        for kind, number in data.num_defects.items()
    ]
    lines += [
        f"WARNING {defect.source} batch {defect.batch_index}: {defect.text}"
        for defect in data.defects[:_MAX_DEFECT_LINES]
    ]
    return [*lines, *data.hints, *data.unchecked]


_MAX_DEFECT_LINES = 6
_DEFECT_WORDS = {
    "nonfinite": "with NaN or Inf",
    "misfit": "with a sample that cannot be learned from",
    "outlier": "far larger than the others",
}
