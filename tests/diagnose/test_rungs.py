"""Each rung changes one thing, and says where it does not apply."""

from dataclasses import replace
from typing import Any

import pytest

from stability_search.diagnose import rungs
from stability_search.diagnose.rungs import LeftOut, Rung, Variant, apply, longer
from stability_search.diagnose.verdict import Cause
from stability_search.settings.trial import TrialConfig
from tests.diagnose.cases import small

FP16: dict[str, Any] = {"learning_rate": 0.01, "precision": "fp16", "init_scale": 65536.0}


def given(**engine: Any) -> TrialConfig:  # noqa: ANN401 - of any setting
    recall = small("", Cause.HEALTHY, "Recall", {**FP16, **engine}, batch_size=2)
    return recall.recipe.config(0)


@pytest.mark.parametrize(
    ("rung", "changes"),
    [
        (rungs.FP32, {"precision": "fp32"}),
        (rungs.BF16, {"precision": "bf16"}),
        (rungs.ATTENTION_FP32, {"attention_precision": "fp32"}),
        (rungs.LOWER_SCALE, {"init_scale": 1024.0, "growth_interval": 20_000}),
        (rungs.TENTH_RATE, {"learning_rate": 0.001}),
        (rungs.DEEPER_RATES[1], {"learning_rate": 1e-5}),
        (rungs.ONE_SAMPLE, {"batch_size": 1}),
        (rungs.GROUP_NORM, {"norm": "group"}),
        (rungs.CAP, {"attention_logit_cap": 30.0}),
        (rungs.AS_GIVEN, {}),
    ],
)
def test_a_rung_changes_what_it_names_and_nothing_else(
    rung: Rung, changes: dict[str, Any]
) -> None:
    config = given()
    variant = apply(rung, config)
    assert isinstance(variant, Variant)
    assert variant.changes == changes
    engine = {name: value for name, value in changes.items() if hasattr(config.engine, name)}
    others = {name: value for name, value in changes.items() if name not in engine}
    assert variant.config == replace(config, engine=replace(config.engine, **engine), **others)


@pytest.mark.parametrize(
    ("rung", "engine", "words"),
    [
        (rungs.FP32, {"precision": "fp32"}, "already trains in fp32"),
        (rungs.BF16, {"precision": "bf16"}, "already trains in bf16"),
        (rungs.ATTENTION_FP32, {"precision": "fp32"}, "already trains in fp32"),
        (rungs.ATTENTION_FP32, {"attention_precision": "fp32"}, "already computed in fp32"),
        (rungs.LOWER_SCALE, {"precision": "bf16"}, "bf16 has no loss scale"),
        (rungs.GROUP_NORM, {"norm": "group"}, "already become GroupNorm"),
        (rungs.CAP, {"attention_logit_cap": 10.0}, "already capped at 10"),
        (rungs.SMALLER, {}, "`ablations` have no `smaller_model`"),
    ],
)
def test_a_rung_that_does_not_apply_says_why(
    rung: Rung, engine: dict[str, Any], words: str
) -> None:
    left_out = apply(rung, given(**engine))
    assert isinstance(left_out, LeftOut)
    assert words in left_out.reason


def test_a_batch_of_one_is_not_made_smaller() -> None:
    assert isinstance(apply(rungs.ONE_SAMPLE, replace(given(), batch_size=1)), LeftOut)


def test_attention_is_bypassed_as_the_task_says_and_its_settings_go_with_it() -> None:
    variant = apply(rungs.BYPASSED, given(attention_logit_cap=30.0, attention_modules=("x",)))
    assert isinstance(variant, Variant)
    assert variant.config.task_args == {"has_attention": False}
    assert variant.config.engine.attention_logit_cap is None
    assert variant.config.engine.attention_modules == ()
    assert variant.changes == {"has_attention": False}


def test_a_task_without_ablations_leaves_their_rungs_out() -> None:
    sines = small("", Cause.HEALTHY, "Sines", FP16).recipe.config(0)
    left_out = apply(rungs.BYPASSED, sines)
    assert isinstance(left_out, LeftOut)
    assert "no `ablations`" in left_out.reason


def test_a_low_scale_is_lowered_further_but_not_below_one() -> None:
    for scale, lower in ((1024.0, 16.0), (2.0, 1.0)):
        variant = apply(rungs.LOWER_SCALE, given(init_scale=scale))
        assert isinstance(variant, Variant)
        assert variant.config.engine.init_scale == lower


def test_longer_stretches_steps_schedule_and_time_together() -> None:
    config = longer(given(), 3)
    assert config.num_planned_steps == config.engine.num_planned_steps == 600
    assert config.timeout_s == 3 * given().timeout_s
