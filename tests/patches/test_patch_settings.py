"""Every value of the patches is checked, and all problems are said at once."""

import dataclasses
from pathlib import Path

import pytest

import stability_search
from stability_search.errors import UsageError
from stability_search.patches import PatchSettings
from stability_search.patches.settings import ALARM_SETTING_NAMES, variable


def test_nothing_set_is_the_default() -> None:
    assert PatchSettings.from_environment({"PATH": "/bin"}) == PatchSettings()
    assert (PatchSettings().first_scale, PatchSettings().interval) == (1024.0, 100)


def test_every_setting_has_its_variable() -> None:
    texts = {
        "init_scale": "2048",
        "growth_interval": "7",
        "min_scale": "2",
        "max_scale": "4096",
        "every_steps": "9",
        "observe": "1",
        "anomaly": "yes",
    }
    found = PatchSettings.from_environment({variable(n): text for n, text in texts.items()})

    wanted = PatchSettings(
        init_scale=2048.0,
        growth_interval=7,
        min_scale=2.0,
        max_scale=4096.0,
        every_steps=9,
        observe=True,
        anomaly=True,
    )
    assert found == wanted
    assert {spec.name for spec in dataclasses.fields(PatchSettings)} == {*texts, "alarms"}


def test_every_alarm_has_its_variable() -> None:
    found = PatchSettings.from_environment(
        {variable("alarms.grad_norm"): "7.5", variable("alarms.on_alarm"): "end_run"}
    )

    assert (found.alarms.grad_norm, found.alarms.on_alarm) == (7.5, "end_run")
    assert "attention_max" not in ALARM_SETTING_NAMES  # nothing here measures it


def test_the_readme_names_every_variable_and_default() -> None:
    text = (Path(stability_search.__file__).parent / "patches" / "README.md").read_text()

    for spec in dataclasses.fields(PatchSettings):
        if spec.name != "alarms":
            option = "--" + spec.name.replace("_", "-")
            assert f"| `{variable(spec.name)}` | `{option}` |" in text
    assert all(f"`{name}`" in text for name in ALARM_SETTING_NAMES if name != "on_alarm")


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        PatchSettings.from_environment(
            {
                "STABILITY_SEARCH_INIT_SCALE": "big",
                "STABILITY_SEARCH_OBSERVE": "perhaps",
                "STABILITY_SEARCH_ALARM_GRAD_NORM": "-1",
                "STABILITY_SEARCH_GROWTH_INTERVALL": "3",
                "STABILITY_SEARCH_DRIVER": "of another part",
            }
        )
    text = str(caught.value)
    assert "STABILITY_SEARCH_INIT_SCALE: must be a number, but got 'big'." in text
    assert "STABILITY_SEARCH_OBSERVE: must be 1 or 0, but got 'perhaps'." in text
    assert "STABILITY_SEARCH_ALARM_GRAD_NORM: a finite number > 0 must hold, but got -1" in text
    assert "GROWTH_INTERVALL: no such setting. Did you mean STABILITY_SEARCH_GROWTH_INT" in text
    assert "DRIVER" not in text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_scale": 0.0}, "init_scale: 0 < value <= 3.4e38 must hold, but got 0."),
        ({"max_scale": float("nan")}, "max_scale: 0 < value <= 3.4e38 must hold, but got nan."),
        ({"growth_interval": 0}, "growth_interval: an integer >= 1 must hold, but got 0."),
        ({"every_steps": 1.5}, "every_steps: an integer >= 1 must hold, but got 1.5."),
        ({"max_scale": 0.5}, r"max_scale: value >= min_scale \(1\) must hold, but got 0.5."),
        (
            {"init_scale": 4096.0, "max_scale": 2048.0},
            r"init_scale: min_scale \(1\) <= value <= 2048 must hold, but got 4096.",
        ),
    ],
)
def test_a_value_outside_its_range_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchSettings(**values)  # type: ignore[arg-type]
    texts = {variable(name): str(value) for name, value in values.items()}
    with pytest.raises(UsageError, match="STABILITY_SEARCH_"):
        PatchSettings.from_environment(texts)
