"""A task's module is looked for without being imported, before anything is written."""

import sys
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.errors import UsageError
from stability_search.settings.trial import TaskReference
from stability_search.task_module import missing_part, no_module, refuse_missing_module

SPACE = """\
task: planted_lm.tiny:Tiny
trial: {steps: 20}
fixed: {learning_rate: 0.01, batch_size: 8, precision: fp32, clip_norm: 1.0}
"""
COMMANDS = [
    ["run", "--space", "../home/one.yaml"],
    ["diagnose", "--space", "../home/one.yaml"],
    ["diagnose", "--overfit", "--space", "../home/one.yaml"],
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that holds a package; the present folder is another one."""
    package = tmp_path / "home" / "planted_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "tiny.py").write_text("class Tiny: ...\n")
    (package.parent / "one.yaml").write_text(SPACE)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return package.parent


def task(module: str, folder: Path | None = None) -> TaskReference:
    return TaskReference(module=module, class_name="Tiny", folder=str(folder or ""))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_that_needs_the_task_refuses_at_once_and_writes_nothing(
    home: Path, words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2

    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("task: planted_lm.tiny:Tiny must be importable from ")
    assert "there is no module `planted_lm`" in said
    assert f"Call this from {home}, which holds `planted_lm`, or set PYTHONPATH={home}." in said
    assert [*Path.cwd().iterdir()] == []
    assert "planted_lm" not in sys.modules


def test_where_the_module_is_found_nothing_is_refused_and_nothing_imported(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="planted_lm"):
        refuse_missing_module(task("planted_lm.tiny"))

    sys.path.append(str(home))
    refuse_missing_module(task("planted_lm.tiny"))
    sys.path.remove(str(home))
    monkeypatch.chdir(home)
    refuse_missing_module(task("planted_lm.tiny"))
    assert "planted_lm" not in sys.modules


def test_a_package_with_code_may_make_modules_and_one_without_may_not(home: Path) -> None:
    sys.path.append(str(home))
    assert missing_part("planted_lm.made") == "planted_lm.made"
    refuse_missing_module(task("planted_lm.made"))

    (home / "planted_lm" / "__init__.py").unlink()
    with pytest.raises(UsageError, match=r"no module `planted_lm\.made`"):
        refuse_missing_module(task("planted_lm.made"))
    refuse_missing_module(task("planted_lm.tiny"))


def test_a_folder_of_that_name_does_not_hide_the_package(home: Path) -> None:
    Path("planted_lm").mkdir()  # of data, for example
    with pytest.raises(UsageError, match=r"no module `planted_lm\.tiny`.* which holds"):
        refuse_missing_module(task("planted_lm.tiny", home))

    sys.path.append(str(home))
    refuse_missing_module(task("planted_lm.tiny"))


def test_what_was_made_by_hand_or_is_a_file_is_not_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = type(sys)("made_by_hand")
    monkeypatch.setitem(sys.modules, "made_by_hand", made)
    refuse_missing_module(task("made_by_hand"))
    refuse_missing_module(TaskReference(file="/no/such/file.py", class_name="Tiny"))
    assert missing_part("made_by_hand.inner") == ""


def test_the_folder_is_named_where_it_is_found(home: Path, tmp_path: Path) -> None:
    one = task("planted_lm.tiny")
    assert "Call this from the folder that holds `planted_lm`" in (
        no_module("planted_lm", one, begun_in=str(tmp_path / "gone")).hint
    )
    assert f"PYTHONPATH={home}." in no_module("planted_lm", one, begun_in=str(home)).hint
    beside = task("planted_lm.tiny", home / "planted_lm")  # the space file lies in the package
    assert f"PYTHONPATH={home}." in no_module("planted_lm", beside).hint

    Path("src").mkdir()
    (home / "planted_lm").rename(Path("src") / "planted_lm")
    assert f"PYTHONPATH={Path.cwd() / 'src'}." in no_module("planted_lm", one).hint
