"""What the README of `stability_search.testing` shows can be run, and what it lists is there."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

import stability_search.testing
from stability_search.testing import Fault

TEXT = (Path(stability_search.testing.__file__).parent / "README.md").read_text(encoding="utf-8")
NUM_FAULTS = 8
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", EXAMPLES, ids=["check_task", "rehearse", "plant"])
def test_every_example_passes(code: str) -> None:
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own text
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_every_fault_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)\(", TEXT, flags=re.MULTILINE)
    assert sorted(listed) == sorted(fault.__name__ for fault in get_args(Fault))
    assert set(listed) < set(stability_search.testing.__all__)


def test_every_fault_is_made_as_listed() -> None:
    calls = re.findall(r"^\| `(.*?)` \|", TEXT, flags=re.MULTILINE)
    made = [eval(call, dict(vars(stability_search.testing))) for call in calls]  # noqa: S307 - our own text
    assert len(made) == len(get_args(Fault)) == NUM_FAULTS
    assert {type(fault) for fault in made} == set(get_args(Fault))


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (Path(stability_search.testing.__file__).parent / link).exists()
