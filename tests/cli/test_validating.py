"""What `validate` could not check is said, and nothing is imported to find out."""

import json
import sys
from pathlib import Path

import pytest

from stability_search.cli import main

SPACE = """\
task: {task}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
"""
HEAD = "note: not checked: "


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the present folder; it has a package that must not be imported."""
    (tmp_path / "planted_pack").mkdir()
    (tmp_path / "planted_pack" / "__init__.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "planted_pack" / "mine.py").write_text("class Mine: ...\n")
    (tmp_path / "mine.py").write_text("class Mine: ...\n")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "inner" / "mine.py").write_text("class Mine: ...\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def validate(folder: Path, capfd: pytest.CaptureFixture[str], task: str) -> list[str]:
    (folder / "space.yaml").write_text(SPACE.format(task=task))
    assert main(["validate", "--space", "space.yaml"]) == 0
    first, *notes = capfd.readouterr().out.splitlines()
    assert first.startswith("space.yaml: ok. ")
    return notes


@pytest.mark.parametrize(
    "task", ["teacher", "./mine.py:Mine", "stability_search.tasks.teacher:Teacher"]
)
def test_a_task_that_was_read_needs_no_note(
    folder: Path, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert validate(folder, capfd, task) == []


@pytest.mark.parametrize(
    ("task", "why"),
    [
        ("planted_pack.mine:Mine", "no package is imported here"),
        ("json:Mine", "no package is imported here"),
        ("outer.inner.mine:Mine", "no package is imported here"),
        ("outer.inner.gone:Mine", "no module `outer.inner.gone` is found from here"),
        ("planted_pack.gone:Mine", "no module `planted_pack.gone` is found from here"),
        ("planted_pack.gone.too:Mine", "no module `planted_pack.gone` is found from here"),
        ("nowhere.at_all:Mine", "no module `nowhere` is found from here"),
        ("planted_pack.mine.inner:Mine", "no module `planted_pack.mine.inner` is found from here"),
    ],
)
def test_a_task_in_a_package_is_said_to_be_unchecked(
    folder: Path, task: str, why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    note = f"{task}, and what its constructor takes; {why}"
    assert validate(folder, capfd, task) == [HEAD + note]
    assert "planted_pack" not in sys.modules

    main(["validate", "--space", "space.yaml", "--format", "json"])
    document = json.loads(capfd.readouterr().out)
    assert document["notes"] == [f"not checked: {note}"]
    assert document["is_valid"]
