"""The place that an error of the task is said to have: one that its author can mend."""

import traceback
from pathlib import Path

import pytest
import torch

from stability_search.diagnose import task_code as task_code_module
from stability_search.diagnose.task_code import place_in_task, place_in_text, task_code
from stability_search.errors import UsageError, UserCodeError

TORCH = str(Path(torch.__file__).parent / "nn" / "functional.py")


def look_up() -> None:
    torch.nn.functional.embedding(torch.tensor([7]), torch.zeros(2, 2))  # raises inside torch


def test_an_error_inside_torch_is_named_where_the_task_called_it() -> None:
    with (
        pytest.raises(
            UserCodeError, match=r"reading failed: IndexError.*test_task_code\.py:\d+\)"
        ),
        task_code("reading"),
    ):
        look_up()


def test_a_printed_traceback_gives_the_same_place() -> None:
    with pytest.raises(IndexError) as caught:
        look_up()
    text = "".join(traceback.format_exception(caught.value))
    assert "functional.py" in text.rpartition("File ")[2]
    assert place_in_text(text) == f"{__file__}:{look_up.__code__.co_firstlineno + 1}"
    assert place_in_text("") == ""


def test_where_no_frame_is_the_task_s_the_innermost_is_named() -> None:
    engine = str(Path(task_code_module.__file__).parents[1] / "trial.py")
    assert place_in_task([(engine, 3), (TORCH, 9)]) == f"{TORCH}:9"
    assert place_in_task([]) == ""
    teacher = str(Path(engine).parent / "tasks" / "teacher.py")
    assert place_in_task([(engine, 3), (teacher, 5), (TORCH, 9)]) == f"{teacher}:5"


def test_an_error_of_ours_stays_as_it_is() -> None:
    with pytest.raises(UsageError, match="as it is"), task_code("reading"):
        raise UsageError("as it is")
