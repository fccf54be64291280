"""The `alarms` block of a space file: every key, from YAML to the trial."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stability_search.settings.alarms import ALARM_SHARES, AlarmSettings, OnAlarm
from stability_search.settings.trial import TrialConfig
from stability_search.space import Space, SpaceError, json_schema

Load = Callable[..., Space]

DEFAULT = AlarmSettings()
KEYS = tuple(spec.name for spec in dataclasses.fields(AlarmSettings))
NUMBERS = tuple(name for name in KEYS if name != "on_alarm")
COUNTS = ("epoch_steps", "late_epoch", "bad_steps_advise", "stale_epochs", "bad_steps")
README = Path(__file__).parents[2] / "search_spaces" / "README.md"


def other(name: str) -> Any:  # noqa: ANN401 - a number or a word
    """Return a value that is not the default."""
    if name == "on_alarm":
        return "end_run"
    if name in COUNTS:
        return 7
    return 0.125 if name in ALARM_SHARES else 80.0


@pytest.mark.parametrize("name", KEYS)
def test_every_key_reaches_the_trial_from_the_file_and_from_set(
    load_text: Load, valid: str, name: str
) -> None:
    value = other(name)
    expected = dataclasses.replace(DEFAULT, **{name: value})
    assert expected != DEFAULT
    for space in (
        load_text(f"{valid}alarms: {{{name}: {value}}}\n"),
        load_text(valid, f"alarms.{name}={value}"),
    ):
        assert space.study.alarms == expected
        config = space.trial_config(space.pilot_settings(), seed=1, steps=50, device="cpu")
        assert config.alarms == expected
        assert type(getattr(config.alarms, name)) is type(getattr(expected, name)) or (
            name == "on_alarm" and config.alarms.on_alarm is OnAlarm.END_RUN
        )


def test_the_gradient_norm_of_the_alarm_is_set_on_the_command_line(
    load_text: Load, valid: str
) -> None:
    assert load_text(valid, "alarms.grad_norm=80").study.alarms.grad_norm == 80.0


@pytest.mark.parametrize("name", NUMBERS)
def test_zero_and_text_are_refused_with_rule_value_and_place(
    load_text: Load, valid: str, name: str
) -> None:
    with pytest.raises(SpaceError, match=rf"alarms.{name}: `{name} > 0` must hold, but got 0\."):
        load_text(f"{valid}alarms: {{{name}: 0}}\n")
    kind = "an integer" if name in COUNTS else "a number"
    with pytest.raises(SpaceError, match=rf"alarms.{name}: {kind} is required, but got 'high'"):
        load_text(f"{valid}alarms: {{{name}: high}}\n")


@pytest.mark.parametrize("name", sorted(ALARM_SHARES))
def test_a_share_in_per_cent_is_refused(load_text: Load, valid: str, name: str) -> None:
    message = rf"alarms.{name}: `{name} <= 1` must hold, but got 50\. Give 1 or less\."
    with pytest.raises(SpaceError, match=message):
        load_text(f"{valid}alarms: {{{name}: 50}}\n")
    assert load_text(f"{valid}alarms: {{{name}: 1}}\n").study.alarms != DEFAULT


def test_only_the_steps_of_an_epoch_may_be_null(load_text: Load, valid: str) -> None:
    assert load_text(f"{valid}alarms: {{epoch_steps: null}}\n").study.alarms == DEFAULT
    with pytest.raises(SpaceError, match=r"alarms.grad_norm: a number is required, but got"):
        load_text(f"{valid}alarms: {{grad_norm: null}}\n")


def test_a_misspelled_key_is_answered_with_the_right_one(load_text: Load, valid: str) -> None:
    with pytest.raises(
        SpaceError, match=r"alarms.grad_norm_jmp: no such key\. Did you mean `grad_"
    ):
        load_text(f"{valid}alarms: {{grad_norm_jmp: 3}}\n")


def test_the_schema_knows_every_key_with_its_default_its_limits_and_its_text() -> None:
    properties = json_schema()["$defs"]["AlarmsBlock"]["properties"]
    assert tuple(properties) == KEYS
    for name, value in properties.items():
        assert value["default"] == getattr(DEFAULT, name)
        assert value["description"]
    for name in set(NUMBERS) - {"epoch_steps"}:
        assert properties[name]["type"] == ("integer" if name in COUNTS else "number")
        assert properties[name]["exclusiveMinimum"] == 0
        assert properties[name].get("maximum") == (1 if name in ALARM_SHARES else None)


def test_a_configuration_with_alarms_survives_json(load_text: Load, valid: str) -> None:
    space = load_text(valid, "alarms.on_alarm=end_epoch", "alarms.epoch_steps=9")
    config = space.trial_config(space.pilot_settings(), seed=1, steps=50, device="cpu")
    again = TrialConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.alarms.on_alarm is OnAlarm.END_EPOCH


def test_the_example_of_the_documentation_loads(load_text: Load, valid: str) -> None:
    example = README.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    alarms = load_text(f"{valid}{example}").study.alarms
    assert (alarms.epoch_steps, alarms.on_alarm) == (500, OnAlarm.END_EPOCH)
    assert (alarms.grad_norm, alarms.grad_norm_late) == (5.0, 2.0)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8")))
def test_every_link_of_the_documentation_leads_somewhere(link: str) -> None:
    assert (README.parent / link).exists()


def test_the_documentation_has_a_row_for_every_key_with_its_default() -> None:
    rows = {
        cells[1].strip(" `"): cells[2].strip()
        for line in README.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) > 3
    }
    shown = {
        name: "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        for name in KEYS
        for value in [getattr(DEFAULT, name)]
    }
    assert {name: rows.get(name) for name in KEYS} == shown


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("choice: [1024, 65536]", "choice: [0.5, 1024]", "space.init_scale"),
        ("choice: [1024, 65536]", "uniform: {low: 0.5, high: 2048}", "space.init_scale"),
        ("batch_size: 2\n", "batch_size: 2\n  init_scale: 0.5\n", "fixed.init_scale"),
    ],
)
def test_a_loss_scale_that_counts_as_collapsed_is_refused_as_the_first_one(
    load_text: Load, valid: str, old: str, new: str, place: str
) -> None:
    if place.startswith("fixed"):
        valid = re.sub(r"  init_scale: .*\n", "", valid).replace("init_scale: 1024, ", "")
    changed = valid.replace(old, new)
    assert changed != valid
    with pytest.raises(
        SpaceError, match=rf"{place}: a finite number >= 1 must hold, but got .*0\.5"
    ):
        load_text(changed)
    load_text(valid.replace(old, new.replace("0.5", "1")))
