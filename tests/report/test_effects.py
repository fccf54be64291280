"""The effect of settings: planted truths are found, and nothing is found where there is none."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from stability_search.records.trial import Outcome
from stability_search.report.context import View
from stability_search.report.effects import (
    MIN_CONFIGURATIONS,
    WORTH_NAMING,
    Configuration,
    Effects,
    configurations_of,
    estimate,
    has_enough,
)
from stability_search.report.parts import effects
from tests.report.study_reports import report_of
from tests.study_rows import empty_study, hopeless_study, stable_study

NAMES = ("learning_rate", "precision", "clip_norm", "cap")
Chance = Callable[[dict[str, Any]], float]


def planted(chance: Chance, *, count: int = 240, seed: int = 0) -> list[Configuration]:
    """Return configurations that are stable with the chance that their settings give them."""
    draw = random.Random(seed)  # noqa: S311 - a test
    found = []
    for index in range(count):
        settings: dict[str, Any] = {
            "config_id": f"c{index}",
            "trial_id": f"t{index}",
            "learning_rate": 10 ** draw.uniform(-4, -1),
            "precision": draw.choice(["fp32", "bf16", "fp16"]),
            "clip_norm": draw.choice([None, 1.0]),
            "cap": draw.choice([None, 30.0]),
        }
        stable = float(draw.random() < chance(settings))
        found.append(Configuration(settings=settings, stable=stable))
    return found


def by_name(found: Effects) -> dict[str, Any]:
    return {effect.name: effect for effect in found.effects}


def test_the_setting_that_decides_is_first_and_its_values_are_right() -> None:
    found = estimate(planted(lambda s: 0.9 if s["precision"] == "fp32" else 0.2), NAMES)
    assert found.effects[0].name == "precision"
    shares = {level.text: level.share for level in found.effects[0].levels}
    for text, truth in (("fp32", 0.9), ("bf16", 0.2), ("fp16", 0.2)):
        assert shares[text].low < truth < shares[text].high
    assert found.effects[0].size.low > 0.4


def test_a_setting_is_not_credited_with_what_another_one_did() -> None:
    # Clipping was tried almost only where the rate was low; the rate alone decides.
    def chance(s: dict[str, Any]) -> float:
        return 0.95 if s["learning_rate"] < 3e-3 else 0.05

    draw = random.Random(1)  # noqa: S311 - a test
    entangled = []
    for one in planted(chance):
        is_low = one.settings["learning_rate"] < 3e-3
        clip = 1.0 if is_low == (draw.random() < 0.9) else None
        entangled.append(replace(one, settings={**one.settings, "clip_norm": clip}))
    clipped = [one for one in entangled if one.settings["clip_norm"]]
    naive = sum(one.stable for one in clipped) / len(clipped)
    found = by_name(estimate(entangled, NAMES))
    assert naive > 0.8  # what a plain share would say of clipping
    assert found["learning_rate"].size.low > 0.5
    assert found["clip_norm"].size.value < 0.2
    assert found["clip_norm"].size.low < 0.1  # so the page does not call it clear


def test_where_nothing_matters_no_interval_excludes_it() -> None:
    clear = 0
    for seed in range(10):
        found = estimate(planted(lambda _: 0.5, seed=seed), ("precision", "clip_norm", "cap"))
        clear += sum(effect.size.low > 0.1 for effect in found.effects)
    assert clear <= 1  # of 30


def test_the_intervals_hold_the_truth_as_often_as_they_say() -> None:
    held = total = 0
    for seed in range(20):
        found = by_name(
            estimate(planted(lambda s: 0.8 if s["cap"] else 0.3, seed=seed, count=120), NAMES)
        )
        for level, truth in zip(found["cap"].levels, (0.3, 0.8), strict=True):
            held += level.share.low <= truth <= level.share.high
            total += 1
    assert total == 40
    assert held >= 34


def test_two_settings_that_only_work_together_are_found_as_a_pair() -> None:
    def together(s: dict[str, Any]) -> float:
        return 0.9 if (s["clip_norm"] is None) == (s["cap"] is None) else 0.1

    def alone(s: dict[str, Any]) -> float:
        return 0.9 if s["cap"] else 0.2

    pair = estimate(planted(together), NAMES).pairs[0]
    assert pair.names == ("clip_norm", "cap")
    assert pair.p_value < 1e-6
    cells = {(cell.first, cell.second): cell for cell in pair.cells}
    assert cells["off", "off"].num_stable > 1.5 * cells["off", "off"].expected
    assert estimate(planted(alone), NAMES).pairs[0].p_value > 0.05


def test_a_setting_that_decides_everything_still_has_finite_numbers() -> None:
    found = estimate(planted(lambda s: 1.0 if s["cap"] else 0.0, count=40), NAMES)
    first = found.effects[0]
    assert first.name == "cap"
    assert 0.8 < first.size.value <= 1.0
    assert all(0 <= level.share.low <= level.share.high <= 1 for level in first.levels)


def test_an_inactive_setting_is_judged_where_it_applies() -> None:
    configurations = [
        replace(
            one,
            settings={
                **one.settings,
                "init_scale": [1024, 65536][i % 2]
                if one.settings["precision"] == "fp16"
                else None,
            },
        )
        for i, one in enumerate(planted(lambda s: 0.7 if s["cap"] else 0.3))
    ]
    found = by_name(estimate(configurations, (*NAMES, "init_scale")))
    assert [level.text for level in found["init_scale"].levels] == ["1024", "65536"]


def test_among_many_settings_a_difference_must_be_surer_to_be_called_clear() -> None:
    """The more settings are looked at, the likelier one of them stands out by chance."""
    configurations = planted(lambda s: 0.75 if s["cap"] else 0.4, count=50, seed=7)
    draw = random.Random(1)  # noqa: S311 - a test
    noise = tuple(f"n{k}" for k in range(16))
    more = [
        replace(one, settings={**one.settings, **{name: draw.choice([1, 2]) for name in noise}})
        for one in configurations
    ]
    few = by_name(estimate(more, ("cap",)))["cap"]
    many = by_name(estimate(more, ("cap", *noise)))["cap"]
    assert few.is_clear
    assert many.size.low > WORTH_NAMING
    assert not many.is_clear


def test_the_same_configurations_give_the_same_numbers() -> None:
    configurations = planted(lambda s: 0.7 if s["cap"] else 0.3, count=60)
    assert estimate(configurations, NAMES) == estimate(configurations, NAMES)


def test_a_configuration_of_many_seeds_counts_once() -> None:
    rows = [
        {"config_id": "a", "is_stable": True},
        *({"config_id": "b", "is_stable": k == 0} for k in range(4)),
    ]
    assert [one.stable for one in configurations_of(rows)] == [1.0, 0.25]


@pytest.mark.parametrize(
    ("num_stable", "count", "is_enough"),
    [(6, MIN_CONFIGURATIONS, True), (6, MIN_CONFIGURATIONS - 1, False), (2, 40, False),
     (38, 40, False)],
)  # fmt: skip
def test_too_little_is_not_estimated(num_stable: int, count: int, is_enough: bool) -> None:
    configurations = [
        Configuration(settings={}, stable=float(k < num_stable)) for k in range(count)
    ]
    assert has_enough(configurations) is is_enough


def test_the_part_says_what_it_left_out_and_what_a_number_is() -> None:
    view = View(report_of(stable_study()))
    figure = effects.build(view).figures[0]
    assert "Left out: 1 error in the task (user error), 1 lost to a machine." in figure.note
    assert view.outcomes[Outcome.USER_ERROR] == 1
    assert "95 % intervals" in figure.note
    assert "goes with the largest clear difference" in figure.finding
    assert "settings taken into account" in figure.note


def test_few_or_equal_ends_are_one_sentence() -> None:
    assert effects.build(View(report_of(empty_study()))).absent.startswith("No trial has ended")
    case = hopeless_study()
    three = replace(case, rows=tuple(r for r in case.rows if r.stage == "search")[:3])
    said = effects.build(View(report_of(three))).absent
    assert said.startswith("3 configurations ended with a result")
    assert "too few to tell settings apart" in said
