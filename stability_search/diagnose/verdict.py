"""From what the ladder showed to one cause. Pure: no model, no clock, no file.

The order is the field's checklist. A rung is a cure where every trial of it held; it is none where
it merely survives at a rate that a tenth of would have learned from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from stability_search.diagnose.batch_statistics import DataReport, DefectKind, Source
from stability_search.diagnose.ends import TrialEnd
from stability_search.diagnose.rungs import RATES, SMALL_BATCH, RungName

CLEARLY = 0.05  # of the loss without progress: a rung has learned if it ends this far below
DEGRADED_LOGITS = 1e3  # attention logits from which training is usually worse
MOST_DATA = 0.5  # share of steps whose batch was at fault, beyond which nothing else is asked


class Cause(StrEnum):
    """The one-word end of a diagnosis."""

    MIXED_PRECISION = "mixed precision"
    ATTENTION = "attention"
    DATA = "data"
    LEARNING_RATE = "learning rate"
    BATCH_NORM = "BatchNorm at batch size 2"
    NOT_FOUND = "not found"
    HEALTHY = "healthy"
    INCOMPLETE = "incomplete"  # interrupted, or the task's own code failed

    @property
    def is_named(self) -> bool:
        """True for a cause that a setting or a mended batch answers."""
        return self not in {Cause.NOT_FOUND, Cause.HEALTHY, Cause.INCOMPLETE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What the ladder has shown so far.

    Attributes:
        as_given: Trials of the configuration as given, a seed each.
        rungs: Trials of every rung that ran, paired with these by seed.
        no_progress: Probe loss that counts as no progress, by seed; missing where not known.
        data: What the batches look like.
        batch_size: Samples of a micro-batch, as given.
        is_soft: True if nothing broke, but nothing was learned in three times the steps either.
    """

    as_given: Sequence[TrialEnd]
    rungs: Mapping[RungName, Sequence[TrialEnd]] = field(default_factory=dict)
    no_progress: Mapping[int, float] = field(default_factory=dict)
    data: DataReport
    batch_size: int
    is_soft: bool = False

    @property
    def failing(self) -> list[TrialEnd]:
        """Trials that failed as given; where nothing broke but nothing was learned, all."""
        return [end for end in self.as_given if self.is_soft or end.has_failed]

    @property
    def has_broken_probe(self) -> bool:
        """True if a training held as given while its probe is NaN or Inf."""
        return any(end.is_probe_broken for end in self.as_given)

    def has_learned(self, end: TrialEnd) -> bool:
        """Say whether a trial held and ended clearly below the loss without progress."""
        level = self.no_progress.get(end.seed)
        if not _held(end) or level is None or end.last_level is None:
            return False
        return end.last_level <= level - CLEARLY * abs(level)

    def cures(self, name: RungName) -> bool:
        """Say whether every trial of a rung held where the configuration as given failed."""
        ends = self.rungs.get(name, ())
        return bool(ends) and all(self._is_cured(name, end) for end in ends)

    def _is_cured(self, name: RungName, end: TrialEnd) -> bool:
        if not _held(end):
            return False
        if self.is_soft or self.has_learned(end):
            return self.has_learned(end)
        is_rate = name in {rung.name for rung in RATES}
        return is_rate or not self._is_too_fast(end)

    def _is_too_fast(self, end: TrialEnd) -> bool:
        """Say whether a trial learned nothing where a lower rate learned."""
        if not end.is_stuck(self.no_progress.get(end.seed)):
            return False
        return any(
            other.seed == end.seed and self.has_learned(other)
            for rung in RATES
            for other in self.rungs.get(rung.name, ())
        )

    def curing_rate(self) -> RungName | None:
        """Return the highest of the lower rates that is a cure; None if none is."""
        return next((rung.name for rung in RATES if self.cures(rung.name)), None)


def decide(evidence: Evidence) -> tuple[Cause, RungName | None]:
    """Name the cause by the first rule that matches.

    Args:
        evidence: What the ladder has shown.

    Returns:
        The cause, and the rung that decided it; None where none did.
    """
    if is_mostly_data(evidence):
        return _data_or_code(evidence), None
    if not evidence.failing:
        return _nothing_fails(evidence), None
    rules = [_left_out, _precision, _attention, _rate, _batch_norm]
    if evidence.is_soft:  # what learns nothing is slow or fast before a part of it is to blame
        rules = [_precision, _rate, _batch_norm, _attention]
    for rule in rules:
        cause, rung = rule(evidence)
        if rung is not None:
            return cause, rung
    return _without_a_cure(evidence), None


def _nothing_fails(evidence: Evidence) -> Cause:
    if _has_bad_data(evidence):
        return _data_or_code(evidence)
    if not evidence.has_broken_probe:
        return Cause.HEALTHY
    is_in_data = has_defect(evidence.data, "probe", DefectKind.NONFINITE)
    return Cause.DATA if is_in_data else Cause.NOT_FOUND


def _data_or_code(evidence: Evidence) -> Cause:
    return Cause.NOT_FOUND if blames_code(evidence) else Cause.DATA


def blames_code(evidence: Evidence) -> bool:
    """Say whether most steps broke on batches with which nothing is wrong.

    No setting and no training is needed for it: the untrained model in fp32 breaks on them, too.
    So many batches are not at fault together; the task's loss or its model is.
    """
    ends = evidence.as_given
    if has_defect(evidence.data, "training", DefectKind.NONFINITE, DefectKind.MISFIT):
        return False
    num_broken = sum(end.num_reference_steps for end in ends)
    is_all = num_broken == sum(end.num_data_steps for end in ends)
    return is_all and num_broken > MOST_DATA * sum(end.num_steps for end in ends)


def has_defect(data: DataReport, source: Source, *kinds: DefectKind) -> bool:
    """Say whether a batch of this source has a defect of these kinds."""
    return any(one.source == source and one.kind in kinds for one in data.defects)


def _without_a_cure(evidence: Evidence) -> Cause:
    if not evidence.is_soft:
        return Cause.NOT_FOUND
    if _has_bad_data(evidence):
        return _data_or_code(evidence)
    is_only_slow = all(map(_is_no_worse, evidence.as_given))
    return Cause.HEALTHY if is_only_slow else Cause.NOT_FOUND


def _left_out(evidence: Evidence) -> tuple[Cause, RungName | None]:
    cures = evidence.cures(RungName.BATCHES_LEFT_OUT)
    return Cause.DATA, RungName.BATCHES_LEFT_OUT if cures else None


def _precision(evidence: Evidence) -> tuple[Cause, RungName | None]:
    return Cause.MIXED_PRECISION, RungName.FP32 if evidence.cures(RungName.FP32) else None


def _attention(evidence: Evidence) -> tuple[Cause, RungName | None]:
    cures = evidence.cures(RungName.ATTENTION_BYPASSED)
    if evidence.is_soft:  # other models learn at another pace: the logits must speak, too
        cures &= any((end.attention_max or 0.0) >= DEGRADED_LOGITS for end in evidence.as_given)
    return Cause.ATTENTION, RungName.ATTENTION_BYPASSED if cures else None


def _rate(evidence: Evidence) -> tuple[Cause, RungName | None]:
    return Cause.LEARNING_RATE, evidence.curing_rate()


def _batch_norm(evidence: Evidence) -> tuple[Cause, RungName | None]:
    cures = evidence.cures(RungName.GROUP_NORM) and evidence.batch_size <= SMALL_BATCH
    return Cause.BATCH_NORM, RungName.GROUP_NORM if cures else None


def _held(end: TrialEnd) -> bool:
    return not (end.has_failed or end.error or end.has_timed_out)


def is_mostly_data(evidence: Evidence) -> bool:
    """Say whether so many steps broke for their batch that nothing else can be asked."""
    ends = evidence.as_given
    return bool(ends) and all(end.num_data_steps > MOST_DATA * end.num_steps for end in ends)


def _has_bad_data(evidence: Evidence) -> bool:
    """Say whether steps broke for their batch, or a target cannot be learned."""
    has_steps = any(end.num_data_steps for end in evidence.as_given)
    return has_steps or evidence.data.has(DefectKind.MISFIT)


def _is_no_worse(end: TrialEnd) -> bool:
    """Say whether a trial ended no clearly higher than it began."""
    if end.first_probe is None or end.last_level is None:
        return False
    # A slow one may begin with a rise: BatchNorm's running statistics move before the weights do.
    return end.last_level <= end.first_probe + CLEARLY * abs(end.first_probe)
