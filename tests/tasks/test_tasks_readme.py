"""What the tasks' README shows and lists is so."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import stability_search.tasks
from stability_search.settings.trial import TaskReference
from stability_search.tasks import base
from stability_search.tasks.loading import forget_tasks, load_task
from stability_search.tasks.teacher import Teacher
from stability_search.testing import check_task

TEXT = (Path(stability_search.tasks.__file__).parent / "README.md").read_text(encoding="utf-8")


def names_of_table(header: str) -> list[str]:
    """Return the names in the first column of the table with this header."""
    rows = TEXT.split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`(\w+)", row.split("|")[1])]


def test_the_task_in_ten_lines_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", list(sys.path))  # a task file adds its folder
    code = TEXT.split("```python\n")[1].split("```")[0]
    file = tmp_path / "line.py"
    file.write_text(code)
    task = load_task(TaskReference(file=str(file), class_name="Line"), {"width": 5})
    forget_tasks()
    assert check_task(task) == ()


def test_every_argument_of_the_teacher_is_listed() -> None:
    assert sorted(names_of_table("argument")) == sorted(inspect.signature(Teacher).parameters)


def test_every_method_of_a_task_is_listed() -> None:
    protocols = [value for value in vars(base).values() if getattr(value, "_is_protocol", False)]
    methods = {
        name
        for protocol in protocols
        for name in vars(protocol)
        if not name.startswith("_") and inspect.isfunction(getattr(protocol, name))
    }
    assert set(names_of_table("method")) == methods
