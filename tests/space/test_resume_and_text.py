"""What may change of a space on resume, and that its text is read back whatever its form."""

from pathlib import Path

import pytest

from stability_search.space import (
    load,
    resume_difference,
    study_identity,
)
from tests.space.refusing import Load


def test_overrides_keep_comments_and_read_back(load_text: Load, valid: str, folder: Path) -> None:
    space = load_text(
        valid,
        "trial.steps=60",
        "confirm={steps: 60}",
        "search.resources.cpu=2",
        "space.clip_norm.choice=[null, 1, 2.50]",
        "start_with.0.learning_rate=2e-3",
        "task_args.mode=a, b",
        "seed=3",
    )
    assert "  steps: 60    # short\n" in space.text
    assert "{choice: [null, 1, 2.50]}  # null is off\n" in space.text
    assert space.text.startswith("# A space for tests.\nname: x\n")
    assert (space.study.trial_steps, space.study.confirm.steps, space.study.seed) == (60, 60, 3)
    assert space.study.search.resources.cpu == 2.0
    assert space.task_args == {"hidden": 32, "mode": "a, b"}
    (folder / "space.yaml").write_text(space.text)
    again = load("space.yaml")
    assert again.study == space.study
    assert again.text == space.text
    assert resume_difference(space, again) == ()


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("task: ./toy.py:Toy\nfixed:\n  learning_rate: 1\nsearch:\n", "search={trials: 2}"),
        ("task: ./toy.py:Toy\nfixed: {learning_rate: 1,}\n", "fixed.eps=1"),
        ("{task: ./toy.py:Toy, fixed: {learning_rate: 1}}", "search.trials=2"),
        ("task: ./toy.py:Toy\nfixed: {learning_rate: 1}\nstart_with:\n- {}\n", "start_with=[]"),
        ("---\ntask: ./toy.py:Toy\nfixed: {learning_rate: 1}\n...\n", "search.trials=2"),
        ("? task\n: ./toy.py:Toy\n? fixed\n: {learning_rate: 1}\n", "fixed.learning_rate=2"),
        ("  task: ./toy.py:Toy\n  fixed: {learning_rate: 1}", "search.trials=2"),
        ("task: |-\n  ./toy.py:Toy\nfixed: {learning_rate: 1}\n", "task=./toy.py:Toy"),
    ],
)
def test_the_text_reads_back_whatever_its_style(
    load_text: Load, folder: Path, text: str, option: str
) -> None:
    space = load_text(text, option)
    (folder / "space.yaml").write_text(space.text)
    assert resume_difference(space, load("space.yaml")) == ()


def test_only_budgets_top_and_seeds_may_rise_on_resume(load_text: Load, valid: str) -> None:
    space = load_text(valid, "search.step_budget=100")
    raised = load_text(
        valid, "search.trials=24", "search.step_budget=null", "confirm.top=4", "confirm.seeds=8"
    )
    assert resume_difference(space, raised) == ()
    assert resume_difference(raised, space) == (
        "search.trials: may only rise, but got 12 after 24.",
        "search.step_budget: may only rise, but got 100 after None.",
        "confirm.top: may only rise, but got 3 after 4.",
        "confirm.seeds: may only rise, but got 5 after 8.",
    )
    other = load_text(
        valid,
        "search.step_budget=100",
        "trial.steps=60",
        "prune.bad_rate=0.5",
        "report.targets.loss=1",
        "fixed.batch_size=4",
        "space.dropout.uniform.high=0.4",
    )
    assert [one.partition(":")[0] for one in resume_difference(space, other)] == [
        "trial.steps",
        "prune.bad_rate",
        "fixed.batch_size",
        "space.dropout.high",
        "report.targets.loss",
    ]


def test_what_only_says_where_trials_run_may_change_on_resume(load_text: Load, valid: str) -> None:
    placed = (
        "search.resources.labels={pool: spot, zone: [a, b]}",
        "search.resources.custom.ssd=1",
    )
    space = load_text(valid, *placed)
    for options in (
        ("search.resources.labels.pool=big",),
        ("search.resources.labels={}", "search.resources.custom={}"),
        ("search.resources.labels={arch: x86}", "search.resources.custom={ssd: 2, tape: 1}"),
    ):
        other = load_text(valid, *placed, *options)
        assert resume_difference(space, other) == ()
        assert study_identity(other) == study_identity(space) == study_identity(load_text(valid))
    # Of these numbers depend: threads, memory, and how a GPU computes.
    constant = ("search.resources.cpu=2", "search.resources.gpu=0.5")
    other = load_text(valid, *placed, *constant, "search.resources.accelerator=H100")
    assert [one.partition(":")[0] for one in resume_difference(space, other)] == [
        "search.resources.cpu",
        "search.resources.gpu",
        "search.resources.accelerator",
    ]
    assert study_identity(other) != study_identity(space)


def test_a_run_keeps_the_folder_it_came_from(load_text: Load, valid: str, folder: Path) -> None:
    load_text(valid)
    space = load("x.yaml", folder=folder.parent)
    assert space.folder == folder.parent
    assert space.task.folder == str(folder.parent)
    assert space.task.file == str(folder / "toy.py")


def test_line_ends_and_a_byte_order_mark_change_nothing(load_text: Load, valid: str) -> None:
    plain = load_text(valid)
    for data in (
        valid.replace("\n", "\r\n").encode(),
        valid.replace("\n", "\r").encode(),
        valid.encode("utf-8-sig"),
    ):
        assert load_text(data) == plain
