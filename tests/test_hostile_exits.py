"""Hostile text through every exit that writes text of its own: all that comes out is in sight.

Page, figures, Markdown and tables have files of their own in tests/report, terminals in tests/cli.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeAlias

import pytest

from stability_search import inert as rule
from stability_search import patches, spreadsheet
from stability_search.errors import UsageError
from stability_search.inert import is_in_sight
from stability_search.patches import messages
from stability_search.patches.messages import Level, Messages
from stability_search.space import writing
from stability_search.spreadsheet import csv_text
from stability_search.training import journal
from stability_search.training.journal import Log
from stability_search.training.layout import TrainDirectory
from tests.hostile_strings import HOSTILE_STRINGS

Capture: TypeAlias = pytest.CaptureFixture[str]


def log_of_a_training(texts: tuple[str, ...], folder: Path, _: Capture) -> str:
    directory = TrainDirectory(path=folder)
    log = Log(directory, lambda _: None)
    for text in texts:
        log.say(text)
    return directory.log.read_text(encoding="utf-8")


def lines_of_patches(texts: tuple[str, ...], _: Path, capture: Capture) -> str:
    for text in texts:
        Messages().say(Level.WARNING, text)
    return capture.readouterr().err


def refusal_of_patches(texts: tuple[str, ...], _: Path, capture: Capture) -> str:
    def refuse() -> NoReturn:
        raise UsageError("\n".join(texts))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(patches, "install", refuse)
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("stability_search.instrument")
    return capture.readouterr().err


def cells_of_a_spreadsheet(texts: tuple[str, ...], _: Path, __: Capture) -> str:
    shown = csv_text(texts, [texts])
    assert shown.count("\n") == 2  # a row is a line
    return shown


def values_of_a_space_file(texts: tuple[str, ...], _: Path, __: Capture) -> str:
    return writing.to_yaml({"texts": list(texts), "names": dict.fromkeys(texts, 1)})


EXITS = {
    log_of_a_training: journal,
    lines_of_patches: messages,
    refusal_of_patches: rule,
    cells_of_a_spreadsheet: spreadsheet,
    values_of_a_space_file: writing,
}
Exit: TypeAlias = Callable[[tuple[str, ...], Path, Capture], str]


@pytest.mark.parametrize("leave", EXITS, ids=lambda one: one.__name__)
def test_nothing_leaves_that_cannot_be_seen(
    leave: Exit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = leave(HOSTILE_STRINGS, tmp_path, capfd)
    assert len(shown) > sum(map(len, HOSTILE_STRINGS))
    assert is_in_sight(shown.replace("\n", ""))
    shown.encode()


@pytest.mark.parametrize("leave", EXITS, ids=lambda one: one.__name__)
def test_the_twin_text_that_leaves_as_it_is_is_found_out(
    leave: Exit,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(EXITS[leave], "inert", lambda text, **_: text)
    shown = leave(("teach\u202ere",), tmp_path, capfd)
    assert not is_in_sight(shown.replace("\n", ""))
