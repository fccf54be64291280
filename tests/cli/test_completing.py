"""What Tab offers: by itself, and in a real bash."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.cli.completing import complete_run, complete_space

ROOT = Path(__file__).resolve().parents[2]
ASK = """
source script
COMP_WORDS=({words}) COMP_CWORD={index}
_stability_search_completion stability-search
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("search_spaces", "runs/a-run", "runs/other", "reports/t-1", "reports/t-2"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("search_spaces/mine.yaml", "teach.yaml", "notes.txt", "runs/a-run/space.yaml"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("incomplete", "offered"),
    [
        ("mi", ["mine"]),
        ("quick", ["quickstart"]),
        ("teach", ["teacher", "teacher_scaler", "teach.yaml"]),
        ("no", []),
        ("runs/a-run/", ["runs/a-run/space.yaml"]),
        ("absent/", []),
    ],
)
def test_a_space_is_a_name_or_a_path(incomplete: str, offered: list[str]) -> None:
    assert complete_space(incomplete) == offered


def test_a_name_that_a_terminal_would_act_on_is_not_offered(folder: Path) -> None:
    for name in ("seen", "a\x1b[2Jb", "a\nb", "\u202egpj", "blank\u3164"):
        (folder / "odd" / name).mkdir(parents=True)
    assert complete_run("odd/") == ["odd/seen/"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("incomplete", "offered"),
    [
        ("runs/", ["runs/a-run", "runs/other/"]),
        ("ru", ["runs/"]),
        ("no", []),
    ],
)
def test_a_run_is_a_directory_and_one_with_a_space_ends_the_word(
    incomplete: str, offered: list[str]
) -> None:
    assert complete_run(incomplete) == offered


@pytest.mark.usefixtures("folder")
def test_without_a_word_the_latest_reports_come_first() -> None:
    assert complete_run("")[:2] == ["reports/t-2/", "reports/t-1/"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_asks_for_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # Which shell runs the tests says nothing about bash.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert main(["--show-completion", "bash"]) == 0
    (folder / "script").write_text(capfd.readouterr().out)
    program = folder / "stability-search"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m stability_search "$@"\n')
    program.chmod(0o755)

    done = subprocess.run(  # noqa: S603 - our own words
        ["bash", "-c", ASK.format(words="stability-search run --space qu", index=3)],  # noqa: S607
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines() == ["quickstart"]
    assert done.stderr == ""
