"""What the folders of all tasks have in common."""

import pytest

from stability_search.tasks.own_folder import sparse_labels


@pytest.mark.parametrize("labels", [(), (0, 1), (0, 99), (5, 7, 119), range(1000)])
def test_labels_may_have_gaps(labels: tuple[int, ...]) -> None:
    assert sparse_labels(labels) == []


def test_labels_that_are_no_class_numbers_are_named() -> None:
    """A speaker's number in a register would make a model of as many outputs."""
    (said,) = sparse_labels([9017, 9020, 9017])
    assert said.startswith("labels must count the classes from 0 on, but 2 different ones")
    assert said.endswith("reach up to 9020: number them 0 to 1")
