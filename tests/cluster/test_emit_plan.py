"""What a scheduler is told: names that it takes, and numbers that it can honour."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stability_search.cluster.emit_plan import EmitPlan, InputFile, scheduler_label
from stability_search.errors import UsageError

PLAN = EmitPlan(
    study="teacher",
    folder="/spaces",
    space="teacher.yaml",
    output="/reports/teacher",
    version="0.1.0",
    ray_version="2.60.0",
)


@given(st.text(max_size=80))
def test_any_name_becomes_a_label_that_every_scheduler_takes(name: str) -> None:
    label = scheduler_label(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", label)
    assert len(label) <= 47  # KubeRay adds to it, and Kubernetes cuts at 63


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("teacher", "teacher"),
        ("teacher-2", "teacher-2"),
        ("a" * 47, "a" * 47),
    ],
)
def test_a_name_that_is_a_label_stays_as_it_is(name: str, label: str) -> None:
    assert scheduler_label(name) == label


def test_two_names_never_become_one_label() -> None:
    names = ["Teacher", "teacher", "teacher!", "teacher?", "2", "study-2", "", "\n", "ü", "ö"]
    names += ["a" * 48, "a" * 49, "a" * 47]
    assert len({scheduler_label(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "../task.py", "a/../../b", "a\0b", "\ud800", "."]
)
def test_a_file_outside_the_folder_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match="must lie in the folder of its space file"):
        InputFile(path=path, content=b"")
    assert InputFile(path="package/..task.py", content=b"").path == "package/..task.py"


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(UsageError) as raised:
        dataclasses.replace(
            PLAN,
            nodes=0,
            cpus_per_node=0,
            gpus_per_node=-1,
            memory_gib_per_node=0,
            storage_gib=0,
            time_limit_s=0,
            image="image\n# and a line",
            version="0.1\n",
            ray_version="",
            output="a\0b",
            overrides=("a\udc80b",),
            study="\ud800",
        )
    assert len(str(raised.value).splitlines()) == 12
    assert dataclasses.replace(PLAN, gpus_per_node=0, time_limit_s=1, image="r/i:1@sha256:0")
