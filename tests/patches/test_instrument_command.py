"""What `instrument` hands to the script it becomes."""

import os
import sys
from pathlib import Path

import pytest

from stability_search.cli import main
from stability_search.patches import startup

Captured = pytest.CaptureFixture[str]


class ReplacedError(Exception):
    """Stands for the program that has taken this process's place."""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Note what the process would become."""
    found: dict[str, object] = {}

    def execve(path: str, words: list[str], environment: dict[str, str]) -> None:
        found.update(path=path, words=words, environment=environment)
        raise ReplacedError

    monkeypatch.setattr(os, "execve", execve)
    return found


def test_settings_travel_in_the_environment(program: dict[str, object]) -> None:
    options = ["--observe", "--anomaly", "--init-scale", "512", "--max-scale", "2048"]
    options += ["--alarm", "grad_norm=7", "--every-steps", "9"]

    assert main(["instrument", *options, "--", sys.executable, "x.py", "--observe"]) == 1
    environment = program["environment"]
    assert isinstance(environment, dict)
    assert program["words"] == [sys.executable, "x.py", "--observe"]
    mine = {name: text for name, text in environment.items() if name not in os.environ}
    mine.pop("PYTHONPATH", None)
    assert mine == {
        "STABILITY_SEARCH_OBSERVE": "1",
        "STABILITY_SEARCH_ANOMALY": "1",
        "STABILITY_SEARCH_INIT_SCALE": "512",
        "STABILITY_SEARCH_MAX_SCALE": "2048",
        "STABILITY_SEARCH_EVERY_STEPS": "9",
        "STABILITY_SEARCH_ALARM_GRAD_NORM": "7",
    }


def test_the_start_up_folder_stands_before_what_was_there(
    program: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "theirs")

    assert main(["instrument", sys.executable, "x.py"]) == 1  # `--` may be left out
    environment = program["environment"]
    assert isinstance(environment, dict)
    first, second = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first), second) == (Path(str(startup.__file__)).parent, "theirs")
    assert (Path(first) / "sitecustomize.py").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-scale", "x", "python"], "STABILITY_SEARCH_INIT_SCALE: must be a number"),
        (["--alarm", "grad_nrom=3", "python"], "--alarm: NAME=VALUE must hold"),
        (["no-such-program"], "no-such-program: no such program. Write the command as"),
        ([], "Missing argument"),
    ],
)
def test_what_cannot_be_honoured_is_exit_2(
    words: list[str], message: str, program: dict[str, object], capsys: Captured
) -> None:
    assert main(["instrument", *words]) == 2
    assert message in capsys.readouterr().err
    assert not program
