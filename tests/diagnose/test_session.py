"""The command from a space file to its files and its exit code."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.cli import main
from stability_search.diagnose import diagnose
from stability_search.diagnose.session import (
    command_with,
    configuration_line,
    device_of,
    load_space,
)
from stability_search.errors import UsageError
from stability_search.interruption import Interrupted

TINY = Path(__file__).parents[1] / "tiny_task.py"
SPACE = """\
name: small
task: tests.diagnose.tasks:Sines
trial: {steps: 20}
fixed: {learning_rate: 1e-2, batch_size: 8}
search: {resources: {gpu: 0}}
"""
VARYING = """\
name: varying
task: teacher
task_args: {input_scale: 2.0}
fixed: {batch_size: 2}
space:
  learning_rate: {loguniform: {low: 1e-6, high: 0.1}}
  precision: {choice: [fp32, bf16, fp16]}
  init_scale: {choice: [1024, 65536], when: {precision: fp16}}
start_with:
  - {learning_rate: 1e-3, precision: fp16, init_scale: 65536}
"""


@pytest.fixture
def space_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "space.yaml"
        path.write_text(text)
        return path

    return write


def read(directory: Path) -> dict[str, object]:
    text = (directory / "diagnosis.json").read_text()
    document: dict[str, object] = json.loads(text, parse_constant=pytest.fail)
    return document


@pytest.mark.fault
def test_a_healthy_training_ends_with_0_and_two_files(
    space_file: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["diagnose", "--space", str(space_file(SPACE)), "--output", str(output)]
    assert main(words) == 0
    assert sorted(path.name for path in output.iterdir()) == ["diagnosis.json", "diagnosis.md"]
    document = read(output)
    verdict = document["verdict"]
    assert isinstance(verdict, dict)
    assert verdict["cause"] == "healthy"
    assert document["num_planned_steps"] == 20
    out, err = capfd.readouterr()
    assert "verdict: healthy" in out
    assert "as given: seed 1: holds 20 steps" in err
    line = "configuration: learning_rate=0.01 batch_size=8 (the file's one)"
    assert line in err
    assert document["configuration"] == line
    assert "(the file's one)" in (output / "diagnosis.md").read_text()

    before = (output / "diagnosis.md").read_bytes()
    assert main(words) == 2  # the directory is used now
    assert (output / "diagnosis.md").read_bytes() == before
    assert "must be empty" in capfd.readouterr().err


@pytest.mark.fault
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("tests.diagnose.tasks:Buggy", "2 in the same way: KeyError"),
        (f"{TINY}:Tiny", "task: reading batches failed: KeyError"),
    ],
)
def test_a_broken_task_ends_with_5_and_what_is_known(
    space_file: Callable[[str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    task: str,
    words: str,
) -> None:
    arguments = "task_args: {behaviour: raise}\n" if task.endswith("Tiny") else ""
    path = space_file(SPACE.replace("tests.diagnose.tasks:Sines", task) + arguments)
    output = tmp_path / "out"
    assert main(["diagnose", "--space", str(path), "--output", str(output)]) == 5
    assert words in capfd.readouterr().err
    verdict = read(output)["verdict"]
    assert isinstance(verdict, dict)
    assert verdict["cause"] == "incomplete"


@pytest.mark.fault
def test_an_interruption_writes_what_is_known_so_far(
    space_file: Callable[[str], Path], tmp_path: Path
) -> None:
    calls = iter(range(60))

    def check() -> None:
        if next(calls) == 40:  # in the second trial
            raise Interrupted(2)

    space, output = spaces.load(space_file(SPACE)), tmp_path / "out"
    with pytest.raises(Interrupted, match=r"diagnosis\.md") as caught:
        diagnose(space, output=output, check=check)
    assert caught.value.exit_code == 130
    document = read(output)
    (rung,) = document["ladder"]  # type: ignore[misc]
    assert len(rung["trials"]) == 1
    assert "stopped by SIGINT" in (output / "diagnosis.md").read_text()


@pytest.mark.fault
def test_a_setting_that_cannot_act_is_refused_and_leaves_nothing(
    space_file: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = space_file(SPACE.replace("batch_size: 8", "batch_size: 8, attention_logit_cap: 30"))
    output = tmp_path / "out"
    assert main(["diagnose", "--space", str(path), "--output", str(output)]) == 2
    assert "needs attention to act on" in capfd.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({"attention_logit_cap": 30.0}, ["fixed.attention_logit_cap=30"]),
        ({"learning_rate": 1e-4}, ["start_with.0.learning_rate=0.0001"]),
        ({"input_scale": 1.0}, ["task_args.input_scale=1"]),
        ({"precision": "bf16"}, ["start_with=[{learning_rate: 0.001, precision: bf16}]"]),
    ],
)
def test_the_next_command_sets_a_setting_where_it_stands_and_is_valid(
    space_file: Callable[[str], Path], changes: dict[str, object], overrides: list[str]
) -> None:
    path = space_file(VARYING)
    command = command_with(spaces.load(path), changes)  # type: ignore[arg-type]
    for override in overrides:
        assert f"--set {override}" in command.replace("'", "")
    changed = spaces.load(path, overrides)
    today = {**changed.task_args, **changed.today_settings()}
    assert {name: today[name] for name in changes} == changes


def test_the_next_command_repeats_what_was_set_and_reads_back(
    space_file: Callable[[str], Path],
) -> None:
    path = space_file(SPACE)
    given = ["fixed.learning_rate=0.5", "trial.steps=5000", "fixed.batch_size=4"]
    command = command_with(load_space(path, given), {"learning_rate": 0.05}, given)
    _, name, *words = shlex.split(command)
    assert name == "diagnose"
    assert words[:1] == ["--space"]
    assert words[2::2] == ["--set"] * 4
    again = load_space(words[1], words[3::2])
    today = again.today_settings()
    assert (today["learning_rate"], today["batch_size"]) == (0.05, 4)
    assert again.study.trial_steps == 5000


def test_a_change_that_only_what_was_set_allows_has_a_command(
    space_file: Callable[[str], Path],
) -> None:
    given = ["space.learning_rate.loguniform.low=1e-9"]
    space = load_space(space_file(VARYING), given)
    assert "learning_rate=1e-08" in command_with(space, {"learning_rate": 1e-8}, given)
    assert command_with(space, {"learning_rate": 1e-8}) == ""


def test_more_steps_than_a_confirm_trial_has_are_diagnosed_all_the_same(
    space_file: Callable[[str], Path],
) -> None:
    path = space_file(SPACE)
    study = load_space(path, ["trial.steps=30", "trial.steps=5000"]).study
    assert (study.trial_steps, study.confirm.steps) == (5000, 5000)
    usual = spaces.load(path).study.confirm.steps
    assert load_space(path, ["trial.steps=30"]).study.confirm.steps == usual
    with pytest.raises(UsageError, match=r"confirm\.steps >= trial\.steps"):
        load_space(path, ["trial.steps=5000", "confirm.steps=40"])
    with pytest.raises(UsageError, match=r"trial\.steps"):
        load_space(path, ["trial.steps=many"])


@pytest.mark.parametrize(
    ("text", "overrides", "line"),
    [
        (SPACE, [], "learning_rate=0.01 batch_size=8 (the file's one)"),
        (
            VARYING,
            [],
            (
                "batch_size=2 learning_rate=0.001 precision=fp16 init_scale=65536 (the first of "
                "start_with)"
            ),
        ),
        (
            VARYING,
            ["start_with=[{precision: fp16}]"],
            (
                "batch_size=2 learning_rate=0.000316228 precision=fp16 init_scale=65536 (the "
                "first of start_with; default or middle of the range: learning_rate, init_scale)"
            ),
        ),
        (
            VARYING,
            ["start_with=[]"],
            (
                "batch_size=2 learning_rate=0.000316228 precision=fp32 (defaults and middles of "
                "the ranges: no start_with)"
            ),
        ),
    ],
)
def test_the_configuration_says_where_it_was_taken_from(
    space_file: Callable[[str], Path], text: str, overrides: list[str], line: str
) -> None:
    assert configuration_line(load_space(space_file(text), overrides)) == f"configuration: {line}"


def test_a_change_that_the_file_forbids_has_no_command(
    space_file: Callable[[str], Path],
) -> None:
    assert command_with(spaces.load(space_file(VARYING)), {"learning_rate": 1e-9}) == ""


def test_a_gpu_that_is_not_there_is_refused(
    space_file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    path = space_file(SPACE)
    assert device_of(spaces.load(path)) == "cpu"
    with pytest.raises(UsageError, match="torch sees none; got 1"):
        device_of(spaces.load(path, ["search.resources.gpu=1"]))
