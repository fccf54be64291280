"""Which cause is named, from ends that a test makes up."""

from dataclasses import replace
from typing import Any

import pytest

from stability_search.diagnose.batch_statistics import DataReport, Defect, DefectKind, Source
from stability_search.diagnose.ends import TrialEnd
from stability_search.diagnose.rungs import RungName
from stability_search.diagnose.verdict import Cause, Evidence, decide

STEPS = 100
NO_PROGRESS = 2.0
CLEAN = DataReport(num_training_batches=9, num_probe_batches=8, training=(), probe=())
MISFIT = DataReport(
    num_training_batches=9, num_probe_batches=8, training=(), probe=(), num_defects={"misfit": 1}
)


def with_defect(kind: DefectKind, source: Source) -> DataReport:
    defect = Defect(kind=kind, source=source, batch_index=3, text="what is wrong")
    return replace(CLEAN, defects=(defect,), num_defects={kind.value: 1})


def fails(seed: int = 0, **changes: Any) -> TrialEnd:  # noqa: ANN401 - of any field
    given: dict[str, Any] = {"failure": "the loss is NaN", "failed_at": 7, "first_probe": 5.0}
    return TrialEnd(seed=seed, num_planned_steps=STEPS, num_steps=12, **{**given, **changes})


def holds(seed: int = 0, level: float | None = 1.0, **changes: Any) -> TrialEnd:  # noqa: ANN401
    return TrialEnd(
        seed=seed,
        num_planned_steps=STEPS,
        num_steps=STEPS,
        first_probe=5.0,
        last_level=level,
        **changes,
    )


def stuck(seed: int = 0, **changes: Any) -> TrialEnd:  # noqa: ANN401 - of any field
    return holds(seed, level=2.1, **changes)


def evidence(
    *as_given: TrialEnd,
    data: DataReport = CLEAN,
    batch_size: int = 2,
    is_soft: bool = False,
    **rungs: TrialEnd,
) -> Evidence:
    return Evidence(
        as_given=as_given,
        rungs={RungName(name): (end,) for name, end in rungs.items()},
        no_progress={end.seed: NO_PROGRESS for end in as_given},
        data=data,
        batch_size=batch_size,
        is_soft=is_soft,
    )


def test_what_holds_and_learns_is_healthy() -> None:
    assert decide(evidence(holds(0), holds(1))) == (Cause.HEALTHY, None)


def test_what_holds_with_broken_batches_has_bad_data() -> None:
    assert decide(evidence(holds(0), holds(1, num_data_steps=1)))[0] is Cause.DATA
    assert decide(evidence(holds(0), data=MISFIT))[0] is Cause.DATA


def test_where_most_steps_break_for_their_batch_nothing_else_is_asked() -> None:
    broken = evidence(fails(num_data_steps=9), fp32=holds())
    assert decide(broken)[0] is Cause.DATA
    assert decide(evidence(fails(num_data_steps=3), fp32=holds()))[0] is Cause.MIXED_PRECISION


@pytest.mark.parametrize(
    ("rungs", "cause"),
    [
        (["fp32", "attention_bypassed", "rate_tenth", "group_norm"], Cause.MIXED_PRECISION),
        (["batches_left_out", "fp32", "rate_tenth"], Cause.DATA),
        (["attention_bypassed", "rate_tenth", "group_norm"], Cause.ATTENTION),
        (["rate_tenth", "group_norm"], Cause.LEARNING_RATE),
        (["rate_thousandth", "group_norm"], Cause.LEARNING_RATE),
        (["group_norm", "batch_size_1"], Cause.BATCH_NORM),
        (["smaller_model", "batch_size_1", "lower_scale"], Cause.NOT_FOUND),
        ([], Cause.NOT_FOUND),
    ],
)
def test_causes_that_overlap_are_told_apart_by_the_order_of_the_checklist(
    rungs: list[str], cause: Cause
) -> None:
    every = {name.value: fails() for name in RungName if name is not RungName.AS_GIVEN}
    cured = {name: holds() for name in rungs}
    assert decide(evidence(fails(), **{**every, **cured}))[0] is cause


def test_a_rung_that_fails_on_one_seed_cures_nothing() -> None:
    given = evidence(fails(0), fails(1))
    both = Evidence(
        as_given=given.as_given,
        rungs={RungName.FP32: (holds(0), fails(1)), RungName.RATE_TENTH: (holds(0), holds(1))},
        no_progress=given.no_progress,
        data=CLEAN,
        batch_size=2,
    )
    assert decide(both) == (Cause.LEARNING_RATE, RungName.RATE_TENTH)


def test_a_rung_that_survives_but_learns_nothing_where_a_tenth_does_cures_nothing() -> None:
    both = {"fp32": stuck(), "rate_tenth": holds(level=1.0)}
    assert decide(evidence(fails(), **both))[0] is Cause.LEARNING_RATE
    slow = {"fp32": stuck(), "rate_tenth": stuck()}
    assert decide(evidence(fails(), **slow))[0] is Cause.MIXED_PRECISION
    level = {"fp32": stuck(), "rate_tenth": holds(level=1.95)}  # below, but not clearly
    assert decide(evidence(fails(), **level))[0] is Cause.MIXED_PRECISION


@pytest.mark.parametrize("end", [holds(error="KeyError: x"), holds(has_timed_out=True)])
def test_a_rung_that_broke_off_cures_nothing(end: TrialEnd) -> None:
    assert decide(evidence(fails(), fp32=end))[0] is Cause.NOT_FOUND


def test_batch_norm_is_blamed_at_small_batches_only() -> None:
    assert decide(evidence(fails(), batch_size=4, group_norm=holds()))[0] is Cause.BATCH_NORM
    assert decide(evidence(fails(), batch_size=5, group_norm=holds()))[0] is Cause.NOT_FOUND


def test_what_learns_nothing_is_too_fast_before_a_part_of_it_is_to_blame() -> None:
    loud = stuck(attention_max=1e5)
    cures = {"rate_tenth": holds(), "group_norm": holds(), "attention_bypassed": holds()}
    assert decide(evidence(loud, is_soft=True, **cures))[0] is Cause.LEARNING_RATE
    del cures["rate_tenth"]
    assert decide(evidence(loud, is_soft=True, **cures))[0] is Cause.BATCH_NORM
    del cures["group_norm"]
    assert decide(evidence(loud, is_soft=True, **cures))[0] is Cause.ATTENTION


def test_attention_that_learns_slowly_is_blamed_for_nothing_while_its_logits_are_small() -> None:
    quiet = evidence(stuck(attention_max=50.0), is_soft=True, attention_bypassed=holds())
    assert decide(quiet)[0] is Cause.HEALTHY


def test_what_learns_nothing_is_cured_by_learning_alone() -> None:
    assert decide(evidence(stuck(), is_soft=True, rate_tenth=stuck()))[0] is Cause.HEALTHY


def test_a_slow_training_whose_loss_rises_a_little_at_first_is_blamed_for_nothing() -> None:
    slow = evidence(stuck(0), holds(1, level=5.2), is_soft=True, rate_tenth=stuck())
    assert decide(slow)[0] is Cause.HEALTHY


def test_a_loss_that_ends_above_its_start_is_not_healthy() -> None:
    worse = holds(level=6.0)
    assert decide(evidence(worse, is_soft=True, rate_tenth=stuck()))[0] is Cause.NOT_FOUND
    assert decide(evidence(worse, is_soft=True, data=MISFIT))[0] is Cause.DATA


def breaking(num_steps: int, seed: int = 0) -> TrialEnd:
    """Hold while so many steps are left out for finite batches that the reference fails on."""
    return holds(seed, num_data_steps=num_steps, num_reference_steps=num_steps)


def test_most_steps_broken_on_finite_batches_are_the_code_s_fault_and_not_the_data_s() -> None:
    assert decide(evidence(breaking(STEPS)))[0] is Cause.NOT_FOUND
    assert decide(evidence(breaking(40), breaking(70)))[0] is Cause.NOT_FOUND
    assert decide(evidence(breaking(40), breaking(50)))[0] is Cause.DATA  # not most of them
    with_nan = holds(num_data_steps=STEPS, num_reference_steps=STEPS - 1)
    assert decide(evidence(with_nan))[0] is Cause.DATA


@pytest.mark.parametrize("kind", [DefectKind.NONFINITE, DefectKind.MISFIT])
def test_most_steps_broken_where_a_batch_is_named_are_the_data_s_fault(kind: DefectKind) -> None:
    broken = breaking(STEPS)
    assert decide(evidence(broken, data=with_defect(kind, "training")))[0] is Cause.DATA
    assert decide(evidence(broken, data=with_defect(kind, "probe")))[0] is Cause.NOT_FOUND


def test_a_probe_of_nan_is_never_healthy() -> None:
    broken = holds(level=None)
    assert decide(evidence(holds(0), broken))[0] is Cause.NOT_FOUND
    in_probe = with_defect(DefectKind.NONFINITE, "probe")
    assert decide(evidence(broken, data=in_probe))[0] is Cause.DATA
    in_training = with_defect(DefectKind.NONFINITE, "training")
    assert decide(evidence(broken, data=in_training))[0] is Cause.NOT_FOUND
