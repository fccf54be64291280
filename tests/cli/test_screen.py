"""A study's end is printed, also where the study cannot return: its process ends in a thread."""

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stability_search.cli import main, outlets
from stability_search.cli.screen import Screen
from stability_search.errors import InfrastructureError
from stability_search.records.verdict import Verdict, VerdictKind
from stability_search.search import study as studies
from stability_search.search.closing import Study
from stability_search.search.driver import output_to
from tests.search.inline_study import write_space


class EndedError(BaseException):
    """Stands in for the end of the process."""


def lost(directory: Path) -> Study:
    verdict = Verdict(kind=VerdictKind.INCOMPLETE, exit_code=4, reason="The head is gone.")
    lines = ("Incomplete. The head\x1b[2J is gone.",)
    return Study(directory=directory, verdict=verdict, lines=lines)


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("options", [[], ["--json-events"]], ids=["plain", "json"])
@pytest.mark.parametrize("name", ["run", "resume"])
def test_the_verdict_of_a_study_that_lost_its_cluster_is_printed(
    name: str,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def lose(*_: object, **told: Any) -> None:  # noqa: ANN401 - as `run_study`
        with output_to(tmp_path / "run.log"):
            in_a_thread(lambda: told["on_lost"](lost(tmp_path)))
            raise EndedError

    monkeypatch.setattr(studies, f"{name}_study", lose)
    space = str(write_space(tmp_path))
    words = {"run": ["run", "--space", space], "resume": ["resume", str(tmp_path)]}[name]
    with pytest.raises(EndedError):
        main([*words, "--address", "head:6379", *options])
    out, err = capfd.readouterr()
    told, other = (err, out) if options else (out, err)
    assert "Incomplete. The head\\x1b[2J is gone.\n" in told
    assert "\nnext: stability-search resume " in told
    assert "Incomplete" not in other
    assert "Incomplete" not in (tmp_path / "run.log").read_text()


def test_nothing_is_shown_after_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The live view would draw over it."""
    left: list[str] = []

    class Outlet(outlets.JsonLines):
        def __exit__(self, *_: object) -> None:
            left.append(sys.stdout.getvalue())  # type: ignore[attr-defined] - a StringIO

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sink = outlets.Sink(sys.stdout)
    monkeypatch.setattr(
        "stability_search.cli.screen.choose_outlet", lambda **_: Outlet(sink, sink)
    )
    screen = Screen(json_events=False)

    def study(_listener: object) -> Study:
        in_a_thread(lambda: screen.end(lost(tmp_path)))
        raise InfrastructureError("as if the process had ended")

    with pytest.raises(InfrastructureError, match="as if"):
        screen.watch(study)
    assert left == [""]  # once, and before the end was printed
    assert "Incomplete" in sys.stdout.getvalue()
