"""A study as its reader sees it: its events while it runs, then its end."""

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stability_search.cli.next_step import next_step
from stability_search.cli.outlets import Outlet, Sink, choose_outlet, data_sink, kept_stderr
from stability_search.cli.printing import folded, short_path
from stability_search.errors import StabilitySearchError
from stability_search.events import Event, Listener
from stability_search.inert import inert

if TYPE_CHECKING:
    from stability_search.search.closing import Study


class Screen:
    """Shows a study.

    Args:
        json_events: True if standard output shall be JSON lines only.
    """

    def __init__(self, *, json_events: bool) -> None:
        self._json_events = json_events
        self._leave_outlet = contextlib.ExitStack()

    def watch(self, study: Callable[[Listener], "Study"]) -> int:
        """Run a study with its events shown, print its end, and return its exit code."""
        with data_sink() as self._out, kept_stderr() as err:
            self._err = Sink(err)
            outlet = choose_outlet(json_events=self._json_events, out=self._out, err=err)
            with self._leave_outlet:
                self._leave_outlet.enter_context(outlet)
                found = _run(study, outlet)
            self.end(found)
        return found.verdict.exit_code

    def end(self, study: "Study") -> None:
        """Show nothing more, and print how the study ended; from whatever thread.

        Args:
            study: As it ended.
        """
        self._leave_outlet.close()
        (self._err if self._json_events else self._out).write(*closing_lines(study))
        if self._out.failure:  # the study is done all the same: its files hold everything
            self._err.write(f"Standard output could not be written: {self._out.failure}.")


def closing_lines(end: "Study") -> list[str]:
    """Return the verdict, the report's path and the next command.

    Args:
        end: A study as it ended; what is hostile in it is made inert here.
    """
    directory = end.directory
    lines = folded(inert(line) for line in end.lines)
    if (directory / "report.html").is_file():
        lines.append(f"report: {inert(short_path(directory / 'report.html'))}")
    return [*lines, f"next: {next_step(directory, end.verdict)}"]


def _run(study: Callable[[Listener], "Study"], outlet: Outlet) -> "Study":
    """Run a study with its events shown; a bug in it is also written to its log."""
    run_directory = ""

    def on_event(event: Event) -> None:
        nonlocal run_directory
        run_directory = event.text("run_directory") or run_directory
        outlet.show(event)

    try:
        return study(on_event)
    except StabilitySearchError:
        raise
    except Exception as error:
        error.add_note(_logged(error, run_directory))
        raise


def _logged(error: Exception, run_directory: str) -> str:
    """Append a bug to the log of the run, and say where it is."""
    log = Path(run_directory) / "run.log"
    if not run_directory or not log.parent.is_dir():
        return "There is no log: the run directory had not been made."
    try:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError as failure:
        return f"Log: {log} (this traceback could not be added: {failure.strerror})"
    return f"Log: {log}"
