"""What an indicator beyond its threshold says beside the verdict."""

from dataclasses import replace
from typing import Any

import pytest

from stability_search.alarms.watch import AlarmWatch
from stability_search.records.trial import Stage, TrialRow
from stability_search.report.alarms import alarm_sentences
from stability_search.report.context import View
from stability_search.settings.alarms import AlarmSettings
from stability_search.tally import Tally
from tests.report.study_reports import report_of
from tests.study_rows import StudyCase, hopeless_study, interrupted_study, stable_study
from tests.test_alarms import FP16, OVERFLOW, steps

QUIET = AlarmSettings(
    attention_max=1e9,
    attention_max_degraded=1e9,
    attention_max_diverging=1e9,
    clip_frac=1.0,
    clamp_frac=1.0,
    cap_frac=1.0,
    grad_norm=1e9,
    grad_norm_advise=1e9,
    overflow_rate=1.0,
    zero_grad_frac=1.0,
    update_ratio=1e9,
    grad_rms_over_eps=1e-9,
)
CALM: dict[str, Any] = {
    "clip_frac": 0.0,
    "clamp_frac": 0.0,
    "cap_frac": 0.0,
    "attention_max": 1.0,
    "grad_norm_max": 1.0,
    "overflow_rate": 0.0,
    "zero_grad_frac": 0.0,
    "update_ratio": 1e-3,
    "grad_rms_over_eps": 1e6,
    "alarms": {},
}


def said(
    thresholds: AlarmSettings,
    *,
    pilot: float | None = None,
    precision: str | None = None,
    **measured: Any,  # noqa: ANN401 - any measurement of a summary
) -> list[str]:
    """Return the sentences where the choice's trials measured this and the pilot's that."""
    case: StudyCase = stable_study()

    def change(row: TrialRow) -> TrialRow:
        if row.stage is Stage.PILOT:
            return replace(row, summary=replace(row.summary, zero_grad_frac=pilot))
        if row.config_id != case.verdict.choice:
            return row
        settings = {**row.settings, **({"precision": precision} if precision else {})}
        return replace(row, settings=settings, summary=replace(row.summary, **measured))

    study = replace(case.study, alarms=thresholds)
    return alarm_sentences(
        View(report_of(replace(case, rows=tuple(map(change, case.rows)), study=study)))
    )


@pytest.mark.parametrize(
    ("name", "value", "limit", "words"),
    [
        ("clip_frac", 0.93, 0.5, "clipped: 93 % of them on its worst seed (alarm at 50 %)"),
        ("clamp_frac", 0.02, 0.01, "attention outputs lay beyond the clamp: 2 % of them on its"),
        ("cap_frac", 0.02, 0.01, "attention logits lay beyond the cap: 2 % of them on its"),
        (
            "attention_max",
            500.0,
            100.0,
            "reached 500 (alarm at 100): only the cap keeps",
        ),
        ("grad_norm", 80.0, 50.0, "reached 80 before clipping (alarm at 50)."),
        ("grad_norm_advise", 120.0, 100.0, "reached 120 before clipping (alarm at 100)."),
        ("update_ratio", 0.02, 0.01, "typical update was 0.02 of its weights in size (alarm at"),
        ("grad_rms_over_eps", 3.0, 10.0, "was 3 times Adam's eps (alarm below 10): eps shrinks"),
    ],
)
def test_an_indicator_beyond_its_threshold_is_told_and_one_below_is_not(
    name: str, value: float, limit: float, words: str
) -> None:
    column = "grad_norm_max" if name.startswith("grad_norm") else name
    measured = {**CALM, column: value}
    sentences = said(replace(QUIET, **{name: limit}), **measured)
    assert len(sentences) == 1
    assert words in sentences[0]
    assert said(QUIET, **measured) == []
    assert said(replace(QUIET, **{name: limit}), **CALM) == []


def test_beside_a_choice_an_alarm_says_that_the_choice_stands() -> None:
    """A verdict that names the settings and a sentence that doubts one must not stand alone."""
    measured = {**CALM, "clip_frac": 1.0, "grad_norm_max": 120.0}
    thresholds = replace(QUIET, clip_frac=0.5, grad_norm_advise=100.0)
    clipped, norm = said(thresholds, **measured)
    assert "all of them on its worst seed" in clipped
    assert "clip_norm, not the gradient, sets the size of a step" in clipped
    assert "The choice stands, for learning_rate and clip_norm together" in clipped
    assert clipped.endswith("run best.yaml with twice its clip_norm.")
    assert norm == (
        "The choice's gradient norm reached 120 before clipping (alarm at 100). The choice "
        "stands: its seeds held with such gradients. Only if a longer training breaks, go on with "
        "a tenth of its learning rate."
    )


def test_beside_what_merely_came_closest_a_tenth_of_the_rate_is_advised() -> None:
    case = hopeless_study()
    measured = {"clip_frac": 1.0, "grad_norm_max": 120.0}
    rows = tuple(replace(r, summary=replace(r.summary, **measured)) for r in case.rows)
    study = replace(case.study, alarms=replace(QUIET, clip_frac=0.5, grad_norm_advise=100.0))
    found = alarm_sentences(View(report_of(replace(case, rows=rows, study=study))))
    assert any("(alarm at 100): a tenth of its learning rate is advised." in one for one in found)
    assert any("sets the size of a step" in one for one in found)
    assert not any("stands" in one for one in found)


def test_what_was_not_measured_raises_no_alarm() -> None:
    assert said(AlarmSettings(), **{**dict.fromkeys(CALM), "alarms": {}}) == []


def shown_by(*overflows: int) -> dict[str, Any]:
    """Return what a trial of 200 fp16 steps shows that overflows in these."""
    tally, by = Tally(), AlarmWatch(AlarmSettings(), num_planned_steps=200)
    changes = [{**FP16, **(OVERFLOW if step in overflows else {})} for step in range(1, 201)]
    for record in steps(*changes):
        tally.add(record)
        tally.count(by.see(record))
    return {**CALM, "overflow_rate": tally.overflows.rate, "alarms": dict(tally.alarms)}


def test_the_report_tells_overflows_where_the_alarm_rose_and_nowhere_else() -> None:
    def sentences(measured: dict[str, Any]) -> list[str]:
        found = said(replace(QUIET, overflow_rate=0.005), **measured)
        return [sentence for sentence in found if "overflow" in sentence]

    one, two = shown_by(60), shown_by(60, 90)
    assert one["overflow_rate"] == 1 / 180  # > 0.005, yet not more than one in 200 steps
    assert sentences(one) == []
    [sentence] = sentences(two)
    assert sentence == (
        "The choice's gradients overflowed in more than 0.5 % of 200 steps in a row, once the "
        "loss scale was found, on 5 of 5 seeds: lower max_scale, or use bf16."
    )
    assert sentences(shown_by(3, 6, 9, 12)) == []  # the search for a scale


def test_overflows_on_one_of_five_seeds_are_told_with_the_number_of_seeds() -> None:
    case = stable_study()
    first = next(row for row in case.rows if row.config_id == case.verdict.choice)

    def sentences(measured: dict[str, Any]) -> list[str]:
        def change(row: TrialRow) -> TrialRow:
            if row.config_id != case.verdict.choice:
                return row
            own = measured if row.seed_index == first.seed_index else CALM
            return replace(row, summary=replace(row.summary, **own))

        rows = tuple(map(change, case.rows))
        found = alarm_sentences(View(report_of(replace(case, rows=rows))))
        return [sentence for sentence in found if "overflow" in sentence]

    assert sentences(shown_by(60)) == []
    [sentence] = sentences(shown_by(60, 90))
    assert "on 1 of 5 seeds" in sentence


def test_zero_gradients_in_low_precision_are_compared_with_the_fp32_pilot() -> None:
    alarms = replace(QUIET, zero_grad_frac=0.2)
    [sentence] = said(alarms, pilot=0.05, **{**CALM, "zero_grad_frac": 0.4})  # the choice is bf16
    assert sentence == (
        "The choice's gradients were zero in 40 % of cases, in the fp32 pilot in 5 % (alarm 20 "
        "points above): small ones vanish in low precision."
    )
    assert said(alarms, pilot=0.25, **{**CALM, "zero_grad_frac": 0.4}) == []
    assert said(alarms, pilot=None, **{**CALM, "zero_grad_frac": 0.4}) == []
    in_fp32 = said(alarms, pilot=0.05, precision="fp32", **{**CALM, "zero_grad_frac": 0.4})
    assert in_fp32 == []


def test_alarms_that_rose_during_training_are_counted_over_the_seeds() -> None:
    rose = {"grad_norm_jump": 2, "bad_steps": 1, "stale_epochs": 7, "clip_frac": 3}
    [sentence] = said(QUIET, **{**CALM, "alarms": rose})
    assert sentence == (
        "The choice's alarms rose in training, over 5 seeds: a gradient norm 10 times that of the "
        "step before (10 times); more than 10 bad (NaN or Inf) steps in an epoch (5 times)."
    )
    assert said(QUIET, **{**CALM, "alarms": {"stale_epochs": 7}}) == []


@pytest.mark.parametrize(
    ("logit", "words"), [(500.0, "to be watched"), (5e3, "degraded"), (5e5, "diverging")]
)
def test_large_logits_without_a_cap_say_how_bad_it_is(logit: float, words: str) -> None:
    measured = {**CALM, "attention_max": logit, "cap_frac": None}
    [sentence] = said(AlarmSettings(), **measured)
    assert sentence.endswith(f"{words}.")


def test_a_study_without_a_headline_raises_no_alarm() -> None:
    assert alarm_sentences(View(report_of(interrupted_study()))) == []
