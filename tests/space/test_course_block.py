"""`report.course` in a space file: read, refused with its place, handed on to best.yaml."""

from collections.abc import Callable

import pytest

from stability_search.course import CourseRow
from stability_search.space import Space, SpaceError, best_yaml, json_schema, load

Load = Callable[..., Space]

HEAD = "task: ./toy.py:Toy\nfixed: {learning_rate: 1e-3}\nreport:\n  course:\n"
ROWS = HEAD + (
    "    - {epoch: 1, loss: [10, 12], wer: [0.95, 0.99]}\n    - {epoch: 5, grad_norm: [2, 5]}\n"
)


def test_rows_are_read_in_order(load_text: Load) -> None:
    assert load_text(ROWS).study.course == (
        CourseRow(epoch=1, intervals={"loss": (10.0, 12.0), "wer": (0.95, 0.99)}),
        CourseRow(epoch=5, intervals={"grad_norm": (2.0, 5.0)}),
    )
    assert load_text("task: ./toy.py:Toy\nfixed: {learning_rate: 1}\n").study.course == ()


def test_the_choice_of_a_study_carries_it_on(load_text: Load) -> None:
    space = load_text(ROWS)
    again = load_text(best_yaml(space, space.settings({}), "a verdict"))
    assert again.study.course == space.study.course


@pytest.mark.parametrize(
    ("row", "place", "message"),
    [
        ("{epoch: 1, loss: [2, 1]}", "5:24", r"course\[0\]\.loss: `\[low, high\]` with"),
        ("{epoch: 1, loss: [1]}", "5:24", r"course\[0\]\.loss: `\[low, high\]` with"),
        ("{epoch: 1, loss: 3}", "5:24", r"course\[0\]\.loss: a list is required, but got 3"),
        ("{epoch: 1, loss: [a, b]}", "5:25", r"course\[0\]\.loss\[0\]: a number is required"),
        ("{loss: [1, 2]}", "5:7", r"course\[0\]: `epoch` is required, but it is missing"),
        ("{epoch: 0, loss: [1, 2]}", "5:15", r"`epoch >= 1` must hold, but got 0"),
        (
            "{epoch: 1}",
            "5:7",
            r"course\[0\]: `loss`, `grad_norm` or a metric, such as .* beside `epoch`",
        ),
        ("3", "5:7", r"course\[0\]: a mapping is required, but got 3"),
    ],
)
def test_a_wrong_row_is_refused_at_its_place(
    load_text: Load, row: str, place: str, message: str
) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        load_text(f"{HEAD}    - {row}\n")
    assert caught.value.problems[0].where.endswith(f":{place}")


def test_epochs_rise(load_text: Load) -> None:
    rows = "    - {epoch: 5, loss: [1, 2]}\n    - {epoch: 5, loss: [1, 1]}\n"
    with pytest.raises(SpaceError, match=r"epochs must rise, but got 5 after 5") as caught:
        load_text(HEAD + rows)
    assert caught.value.problems[0].where.endswith(":6:15")


def test_the_teacher_has_the_course_that_its_team_expected() -> None:
    rows = load("teacher").study.course
    assert [row.epoch for row in rows] == [1, 5, 10, 20, 50]
    assert [row.intervals["loss"][1] for row in rows] == [12, 10, 8, 6, 4]
    assert [row.intervals["word_error_rate"][1] for row in rows] == [0.99, 0.9, 0.8, 0.6, 0.3]
    assert [row.intervals["grad_norm"] for row in rows[-2:]] == [(0.5, 2), (0.2, 1)]


def test_the_schema_asks_for_two_ends() -> None:
    block = json_schema()["$defs"]["CourseRowBlock"]
    assert block["required"] == ["epoch"]
    ends = block["additionalProperties"]
    assert (ends["minItems"], ends["maxItems"]) == (2, 2)
    assert block["additionalProperties"]["items"] == {"type": "number"}
