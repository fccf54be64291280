"""A task in a folder of a project, called from its root: the root's packages are the task's."""

import sys
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.tasks.loading import forget_tasks
from tests.training.world import TINY

SPACE = """
name: one
task: ../models_of_ours/task.py:Tiny
trial: {steps: 20}
fixed: {learning_rate: 0.01, batch_size: 8, precision: fp32, clip_norm: 1.0}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a project's root, as an installed command sees it."""
    root = tmp_path / "project"
    for name in ("models_of_ours", "configs"):
        (root / name).mkdir(parents=True)
    text = TINY.read_text()
    (root / "models_of_ours" / "task.py").write_text(f"import models_of_ours.net\n{text}")
    (root / "models_of_ours" / "net.py").write_text("WIDTH = 4\n")
    (root / "configs" / "one.yaml").write_text(SPACE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("models_of_ours", "models_of_ours.net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return root


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    """Call the command as the shell does, from a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["stability-search", *words])
    return main()


def test_train_finds_what_lies_in_the_current_folder_and_keeps_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("train", "--space", "configs/one.yaml", "--steps", "4", "--output", "run")
    assert call(monkeypatch, project, *words) == 0
    assert (project / "run" / "models_of_ours" / "net.py").is_file()

    for name in ("models_of_ours", "models_of_ours.net"):
        sys.modules.pop(name, None)
    forget_tasks()
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(project)])
    again = ("train", "--resume", str(project / "run"), "--steps", "6")
    assert call(monkeypatch, tmp_path, *again) == 0
    assert sys.modules["models_of_ours.net"].__file__ == str(
        project / "run" / "models_of_ours" / "net.py"
    )


def test_an_installed_command_looks_in_the_current_folder_last(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, project, "--version") == 0
    assert call(monkeypatch, project, "--version") == 0
    assert sys.path[-1] == str(project)
    assert sys.path.count(str(project)) == 1
    assert capfd.readouterr().out.startswith("stability-search")
