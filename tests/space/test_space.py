"""What a right file becomes."""

import dataclasses
import itertools
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest

from stability_search.records.values import Json
from stability_search.settings.alarms import AlarmSettings, OnAlarm
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space import (
    RESERVED_COLUMNS,
    Parameter,
    SpaceError,
    best_yaml,
    describe,
    find,
    json_schema,
    load,
)
from tests.space.refusing import Load

TODAY = {
    "learning_rate": 1e-3,
    "precision": "fp16",
    "init_scale": 1024,
    "clip_norm": 1,
    "dropout": 0.25,
    "accumulation_steps": 2,
}


def test_defaults_are_those_of_the_settings(load_text: Load) -> None:
    space = load_text("task: ./toy.py:Toy\nfixed: {learning_rate: 1}\n", name="my-study.yaml")
    assert space.study.name == "my-study"
    assert dataclasses.replace(space.study, name="") == dataclasses.replace(
        load_text("name: other\ntask: ./toy.py:Toy\nfixed: {learning_rate: 1}\n").study, name=""
    )
    assert (space.study.trial_steps, space.study.timeout_s, space.study.seed) == (200, 300.0, 0)
    assert space.study.search.max_concurrent is None
    assert space.study.search.resources.gpu is None
    assert space.study.alarms == AlarmSettings()
    assert not space.has_space
    assert space.fixed == {"learning_rate": 1.0}
    assert type(space.fixed["learning_rate"]) is float


def test_every_block_reaches_the_study(load_text: Load) -> None:
    study = load_text(
        "task: ./toy.py:Toy\nname: n\nseed: 7\nfixed: {learning_rate: 1}\n"
        "trial: {steps: 40, timeout_s: 9}\n"
        "search: {trials: 5, sampler: qmc, max_concurrent: 2, time_budget_s: 60,\n"
        "  step_budget: 900, resources: {cpu: 0.5, gpu: 0.25, accelerator: H100,\n"
        "  custom: {fast_disk: 1, share: 0.5}, labels: {pool: spot, zone: [a, b]}}}\n"
        "prune: {bad_rate: 0.1, false_kill: 0.02, control: 0.05}\n"
        "confirm: {top: 1, seeds: 2, steps: 40, octaves: 0, min_margin: 0}\n"
        "report: {targets: {word_error_rate: 0.3, grad_norm: 5}}\n"
        "alarms: {epoch_steps: 10, on_alarm: end_run, grad_norm: 20}\n"
    ).study
    assert (study.name, study.seed, study.trial_steps, study.timeout_s) == ("n", 7, 40, 9.0)
    assert (study.search.trials, study.search.sampler) == (5, "qmc")
    assert (study.search.max_concurrent, study.search.step_budget) == (2, 900)
    assert study.search.time_budget_s == 60.0
    resources = study.search.resources
    assert (resources.cpu, resources.gpu, resources.accelerator) == (0.5, 0.25, "H100")
    assert resources.custom == {"fast_disk": 1.0, "share": 0.5}
    assert resources.labels == {"pool": ("spot",), "zone": ("a", "b")}
    assert (study.kill_rule.bad_rate, study.kill_rule.false_kill, study.control) == (
        0.1,
        0.02,
        0.05,
    )
    assert dataclasses.astuple(study.confirm) == (1, 2, 40, 0, 0)
    assert study.targets == {"word_error_rate": 0.3, "grad_norm": 5.0}
    assert (study.alarms.epoch_steps, study.alarms.on_alarm) == (10, OnAlarm.END_RUN)


def test_settings_hold_floats_where_the_engine_does(load_text: Load, valid: str) -> None:
    space = load_text(valid)
    settings = space.settings(TODAY)
    assert settings == {
        "batch_size": 2,
        "learning_rate": 1e-3,
        "precision": "fp16",
        "init_scale": 1024.0,
        "clip_norm": 1.0,
        "dropout": 0.25,
        "accumulation_steps": 2,
    }
    assert type(settings["clip_norm"]) is float
    assert type(settings["accumulation_steps"]) is int
    assert space.config_id(settings) == space.config_id(
        space.settings({**TODAY, "clip_norm": 1.0})
    )


def test_an_inactive_setting_is_null_and_no_part_of_the_hash(load_text: Load, valid: str) -> None:
    space = load_text(valid)
    calm = {**TODAY, "precision": "fp32"}
    settings = space.settings(calm)
    assert settings["init_scale"] is None
    del calm["init_scale"]
    assert space.config_id(space.settings(calm)) == space.config_id(settings)
    engine = space.trial_config(settings, seed=1, steps=50, device="cpu").engine
    assert engine.init_scale == 65536.0
    with pytest.raises(ValueError, match="init_scale: a value is required"):
        space.settings({**calm, "precision": "fp16"})


def test_a_trial_gets_engine_and_task_settings_and_time_in_proportion(
    load_text: Load, valid: str, folder: Path
) -> None:
    space = load_text(valid)
    config = space.trial_config(space.settings(TODAY), seed=3, steps=400, device="cuda")
    assert config.task_args == {"hidden": 32, "dropout": 0.25}
    assert (config.batch_size, config.accumulation_steps) == (2, 2)
    assert (config.engine.learning_rate, config.engine.clip_norm) == (1e-3, 1.0)
    assert (config.num_planned_steps, config.engine.num_planned_steps) == (400, 400)
    assert config.timeout_s == 100 * 400 / 50
    assert (config.seed, config.device) == (3, "cuda")
    assert config.task.file == str(folder / "toy.py")
    assert config.task.folder == str(folder)


def test_attention_modules_reach_the_engine(load_text: Load) -> None:
    space = load_text(
        "task: ./toy.py:Toy\nfixed: {learning_rate: 1, attention_modules: [a.*, b]}\n"
    )
    config = space.trial_config(space.settings({}), seed=0, steps=20, device="cpu")
    assert config.engine.attention_modules == ("a.*", "b")


def test_conditions_are_and_over_keys_and_or_over_a_list(load_text: Load) -> None:
    space = load_text(
        "task: ./toy.py:Toy\nfixed: {learning_rate: 1, schedule: linear}\nspace:\n"
        "  dropout: {choice: [0.1], when: {mode: [a, b], eps: 1e-3, schedule: linear, "
        "beta1: 0.9}}\n"
        "  eps: {choice: [1e-3, 1e-4], when: {mode: a}}\n"
        "  mode: {choice: [a, b, c]}\n"
    )
    assert space.varying == ("mode", "eps", "dropout")
    values: dict[str, Json] = {"mode": "a", "eps": 1e-3, "dropout": 0.1}
    assert space.settings(values)["dropout"] == 0.1
    assert space.settings({**values, "eps": 1e-4})["dropout"] is None
    assert space.settings({**values, "mode": "b"})["dropout"] is None  # eps is inactive
    assert describe(space).startswith("x.yaml: ok. 3 settings vary (2 conditional), 2 fixed; ")


def test_another_learning_rate_changes_nothing_else(load_text: Load, valid: str) -> None:
    space = load_text(valid)
    settings = space.settings(TODAY)
    doubled = space.at_learning_rate(settings, 0.6)
    assert doubled == {**settings, "learning_rate": 0.6}
    fixed = load_text("task: ./toy.py:Toy\nfixed: {learning_rate: 1}\n")
    assert fixed.at_learning_rate(fixed.settings({}), 2) == {"learning_rate": 2.0}


@pytest.mark.parametrize(
    ("learning_rate", "span"),
    [
        ("space: {learning_rate: {loguniform: {low: 1e-4, high: 0.3}}}", (1e-4, 0.3)),
        ("space: {learning_rate: {choice: [0.1, 1e-3, 1e-2]}}", (1e-3, 0.1)),
        ("fixed: {learning_rate: 0.02}", (0.005, 0.08)),
        ("space: {learning_rate: {choice: [0.02]}}", (0.005, 0.08)),
    ],
)
def test_the_pilot_sweeps_seven_rates_even_in_log(
    load_text: Load, learning_rate: str, span: tuple[float, float]
) -> None:
    rates = load_text(f"task: ./toy.py:Toy\n{learning_rate}\n").pilot_learning_rates()
    assert len(rates) == 7
    assert (rates[0], rates[-1]) == span
    ratios = [after / before for before, after in itertools.pairwise(rates)]
    assert ratios == pytest.approx([ratios[0]] * 6, rel=1e-12)


def test_the_pilot_takes_today_then_defaults_then_middles_in_fp32(load_text: Load) -> None:
    text = (
        "task: ./toy.py:Toy\nfixed: {precision: fp16}\nspace:\n"
        "  learning_rate: {loguniform: {low: 1e-4, high: 1}}\n"
        "  clip_norm: {choice: [null, 5, 0.5]}\n"
        "  attention_clamp: {uniform: {low: 2, high: 4}}\n"
        "  beta2: {choice: [0.99, 0.999]}\n"
        "  batch_size: {logint: {low: 1, high: 9}}\n"
        "  hidden: {choice: [8, 64]}\n"
        "  eps: {choice: [1e-4]}\n"
        "  init_scale: {choice: [8], when: {precision: fp16}}\n"
        "start_with: [{eps: 1e-4, learning_rate: 0.5}, {eps: 1e-4}]\n"
    )
    space = load_text(text)
    assert space.pilot_settings() == {
        "precision": "fp32",
        "learning_rate": 0.5,
        "clip_norm": None,
        "attention_clamp": 3.0,
        "beta2": 0.999,
        "batch_size": 3,
        "hidden": 64,
        "eps": 1e-4,
        "init_scale": None,
    }
    changed = space.pilot_settings(with_stabilisers=True)
    assert (changed["clip_norm"], changed["attention_clamp"]) == (0.5, 2.0)
    assert changed["beta2"] == 0.999


def test_a_start_keeps_null_where_null_is_a_choice_of_a_setting_that_applies(
    load_text: Load,
) -> None:
    text = (
        "task: ./toy.py:Toy\nspace:\n  learning_rate: {uniform: {low: 0.1, high: 1}}\n"
        "  precision: {choice: [fp32, fp16]}\n"
        "  max_scale: {choice: [null, 2048], when: {precision: fp16}}\n"
        "start_with:\n"
        "  - {learning_rate: 0.5, precision: fp16, max_scale: null}\n"
        "  - {learning_rate: 0.5, precision: fp32, max_scale: null}\n"
    )
    first, second = load_text(text).start_with
    assert first == {"learning_rate": 0.5, "precision": "fp16", "max_scale": None}
    assert second == {"learning_rate": 0.5, "precision": "fp32"}


def test_a_start_may_leave_values_out_and_repeat_fixed_ones(load_text: Load, valid: str) -> None:
    starts = load_text(
        valid.replace("  - {", "  - {batch_size: 2, precision: bf16, init_scale: null}\n  - {")
    ).start_with
    assert starts[0] == {"precision": "bf16"}
    assert starts[1]["clip_norm"] == 1.0


def test_names_nobody_can_check_are_said(load_text: Load) -> None:
    for task in ("./toy.py:Open", "./toy.py:Stranger", "some.module:Task"):
        space = load_text(
            f"task: {task}\ntask_args: {{width: 3}}\nfixed: {{learning_rate: 1, depth: 2}}\n"
        )
        assert space.unchecked == ("depth", "width")
        assert describe(space).endswith("; not checked: depth, width")
    heir = load_text("task: ./toy.py:Heir\nfixed: {learning_rate: 1, hidden: 3}\n")
    assert heir.unchecked == ()
    config = heir.trial_config(heir.settings({}), seed=0, steps=20, device="cpu")
    assert config.task_args == {"hidden": 3}
    data = load_text("task: ./toy.py:Data\ntask_args: {path: a}\nfixed: {learning_rate: 1}\n")
    assert data.unchecked == ()


def test_describe_counts(load_text: Load, valid: str) -> None:
    assert describe(load_text(valid)) == (
        "x.yaml: ok. 6 settings vary (1 conditional), 1 fixed; 12 trials of 50 steps, then up to "
        "4 ladders of 400 steps on 5 seeds"
    )
    single = load_text("task: ./toy.py:Toy\nfixed: {learning_rate: 1}\n")
    assert describe(single) == (
        "x.yaml: ok. 1 configuration, 1 fixed; no search, then 1 ladder of 400 steps on 5 seeds"
    )


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_the_best_file_is_the_same_configuration(
    load_text: Load, valid: str, folder: Path, precision: str
) -> None:
    space = load_text(valid)
    settings = space.at_learning_rate(space.settings({**TODAY, "precision": precision}), 1.25e-05)
    text = best_yaml(space, settings, "stable over 400 steps\nscore 71 \x1b[31m")
    assert text.startswith("# stable over 400 steps\n# score 71 \\x1b[31m\nname: x\n")
    (folder / "best.yaml").write_text(text)
    best = load("best.yaml")
    assert not best.has_space
    assert best.study == space.study
    assert best.config_id(best.settings({})) == space.config_id(settings)
    ours = best.trial_config(best.settings({}), seed=1, steps=400, device="cpu")
    assert ours == space.trial_config(settings, seed=1, steps=400, device="cpu")


def test_the_choice_finds_the_files_of_its_task_from_anywhere(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "clips").mkdir(parents=True)
    (home / "space.yaml").write_text(
        "task: teacher\ntask_args: {data_dir: clips, variant: stable}\n"
        "fixed: {learning_rate: 0.1}\n"
    )
    space = load(home / "space.yaml")
    (tmp_path / "best.yaml").write_text(best_yaml(space, space.settings({}), ""))

    again = load(tmp_path / "best.yaml")
    assert again.task_args == {"data_dir": str(home / "clips"), "variant": "stable"}


def test_find_looks_at_the_path_then_the_folder_then_the_shipped_files(folder: Path) -> None:
    assert find("teacher").name == "teacher.yaml"
    (folder / "search_spaces").mkdir()
    (folder / "search_spaces" / "teacher.yaml").write_text("")
    assert find("teacher") == Path("search_spaces/teacher.yaml")
    (folder / "teacher").write_text("")
    assert find("teacher") == Path("teacher")
    with pytest.raises(SpaceError, match=r"no such space file.*Did you mean `teacher`"):
        find("techer")
    with pytest.raises(SpaceError, match="no such space file"):
        find("a\0b")
    with pytest.raises(SpaceError, match="no such space file"):
        load(folder)


def test_reading_imports_no_big_library_and_is_quick(folder: Path, valid: str) -> None:
    (folder / "x.yaml").write_text(valid)
    code = (
        "import sys; from stability_search import space; space.load('x.yaml'); "
        "space.json_schema();"
        "print([n for n in ('torch','ray','pandas','optuna','plotly','numpy') if n in "
        "sys.modules])"
    )
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(  # noqa: S603  (our own interpreter)
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "[]\n"
    twin = subprocess.run(  # noqa: S603  (shows that the check can fail)
        [sys.executable, "-c", f"import numpy; {code}"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert twin.stdout == "['numpy']\n"
    assert min(timeit.repeat(lambda: load("x.yaml"), time.process_time, number=1, repeat=3)) < 0.3


def test_parameters_know_what_they_contain() -> None:
    choice = Parameter(name="x", kind="choice", choices=(None, 1, "a", True))
    assert [choice.contains(value) for value in (None, 1, 1.0, "a", True, False, 2)] == [
        True, True, True, True, True, False, False,
    ]  # fmt: skip
    assert not Parameter(name="x", kind="choice", choices=(1,)).contains(value=True)
    number = Parameter(name="x", kind="uniform", low=0.0, high=1.0)
    values = (0, 1.0, 1.1, float("nan"), float("inf"), "a", None, True)
    assert [number.contains(value) for value in values] == [True, True] + [False] * 6
    whole = Parameter(name="x", kind="logint", low=1, high=100)
    assert [whole.contains(value) for value in (1, 2.5, 101, float("nan"))] == [
        True, False, False, False,
    ]  # fmt: skip
    assert whole.middle() == 10


def test_reserved_columns_hold_what_the_tables_have() -> None:
    assert {"trial_id", "stage", "config_id", "outcome", "reason", "q", "seed", "score"} <= set(
        RESERVED_COLUMNS
    )
    assert not set(RESERVED_COLUMNS) & set(SETTING_NAMES)


def test_the_schema_accepts_shipped_files_and_refuses_unknown_keys() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="comes with ray[default]")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = {
        "task": "teacher",
        "fixed": {"batch_size": 2, "clip_norm": None},
        "space": {"learning_rate": {"loguniform": {"low": 1e-5, "high": 1}}},
        "search": {"max_concurrent": "auto"},
    }
    assert validator.is_valid(good)
    for wrong in (
        {"seeed": 1},
        {"space": {}},
        {"space": {"learning_rate": {"choice": [1], "int": {"low": 1, "high": 2}}}},
        {"search": {"max_concurrent": "many"}},
        {"fixed": {"precision": "fp61"}},
        {"trial": {"steps": 1}},
    ):
        assert not validator.is_valid({**good, **wrong}), wrong
    documented = schema["properties"]["fixed"]["properties"]
    assert set(documented) == set(SETTING_NAMES)
    assert documented["eps"]["description"].startswith("Added to Adam's denominator")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml")), ids=str
)
def test_every_shipped_file_is_right(path: Path) -> None:
    assert load(path).unchecked == ()
