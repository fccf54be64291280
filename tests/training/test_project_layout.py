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
    assert (project / "run" / "imported" / "models_of_ours" / "net.py").is_file()

    for name in ("models_of_ours", "models_of_ours.net"):
        sys.modules.pop(name, None)
    forget_tasks()
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one != str(project)])
    again = ("train", "--resume", str(project / "run"), "--steps", "6")
    assert call(monkeypatch, tmp_path, *again) == 0
    assert sys.modules["models_of_ours.net"].__file__ == str(
        project / "run" / "imported" / "models_of_ours" / "net.py"
    )


def test_the_copies_are_used_only_where_the_originals_are_not_found(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = project / "asset.txt"
    asset.touch()
    net = project / "models_of_ours" / "net.py"
    net.write_text("from pathlib import Path\nFILE = Path(__file__).parents[1] / 'asset.txt'\n")
    with net.open("a") as file:
        file.write("FILE.read_text()\n")  # not beside a copy
    words = ("train", "--space", "configs/one.yaml", "--steps", "4", "--output", "run")
    assert call(monkeypatch, project, *words) == 0
    for name in ("models_of_ours", "models_of_ours.net"):
        sys.modules.pop(name, None)
    forget_tasks()
    assert call(monkeypatch, project, "train", "--resume", "run", "--steps", "6") == 0
    assert sys.modules["models_of_ours.net"].__file__ == str(net)


def test_a_command_that_builds_no_task_looks_nowhere_else(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [*sys.path]
    for words in (["--version"], ["validate", "--space", "configs/one.yaml"]):
        assert call(monkeypatch, project, *words) == 0
    assert sys.path == before


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("import no_such_module_at_all", "call from the root of your project"),
        ("from .net import WIDTH", "Name the task as a module of its package"),
        ("open('/no/such/file')", "name those by absolute paths"),
    ],
)
def test_what_cannot_be_imported_is_told_with_a_way_out(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    line: str,
    hint: str,
) -> None:
    task = project / "models_of_ours" / "task.py"
    task.write_text(f"{line}\n{task.read_text()}")
    words = ("train", "--space", "configs/one.yaml", "--steps", "4", "--output", "run")
    assert call(monkeypatch, project, *words) == 2
    assert hint in capfd.readouterr().err
