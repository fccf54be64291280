"""What each command takes and prints.

Typer only parses: a command function returns the work, and `main` does it outside of Typer, so
that Typer's own handling of exceptions never sees it. Work loads what it needs when it runs.
"""

import json
import shlex
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from stability_search import __version__
from stability_search.cli.cluster_commands import fetch, logs, stop, submit
from stability_search.cli.comparing import compare
from stability_search.cli.diagnosing import diagnose
from stability_search.cli.doctor_command import doctor
from stability_search.cli.drawing import Drawing, FiguresOption
from stability_search.cli.dry_running import print_dry_run
from stability_search.cli.formats import Format, FormatOption, print_formatted
from stability_search.cli.instrumenting import CONTEXT, instrument
from stability_search.cli.next_step import copy_warnings
from stability_search.cli.options import (
    AddressOption,
    DryRunOption,
    JsonOption,
    OutputOption,
    RunArgument,
    SetOption,
    SpaceOption,
    TrackerOption,
    Work,
)
from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import print_data, short_path
from stability_search.cli.screen import Screen, closing_lines
from stability_search.cli.status_command import status
from stability_search.cli.tracked import tracked
from stability_search.cli.training_commands import train
from stability_search.cli.validating import validate
from stability_search.errors import UsageError
from stability_search.inert import inert


def parse(words: Sequence[str]) -> int | Work:
    """Turn the words after `stability-search` into work.

    Returns:
        The work; or 0 where help or the version was asked for and printed.

    Raises:
        typer.TyperException: The words make no command.
    """
    command = typer.main.get_command(_program(shlex.join(["stability-search", *words])))
    parsed: int | Work = command.main(
        list(words), prog_name="stability-search", standalone_mode=False
    )
    return parsed


def _program(command_line: str) -> typer.Typer:
    program = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,  # help stays fast, and nothing reads markup
        pretty_exceptions_enable=False,
        help="Find the most stable training configuration that still learns.",
    )
    program.callback()(_options)
    program.command("run")(_run_command(command_line))
    program.command("resume")(_resume_command(command_line))
    program.command("status")(status)
    program.command("report")(_report)
    program.command("compare")(compare)
    program.command("validate")(validate)
    program.command("diagnose")(diagnose)
    program.command("train")(train)
    program.command("instrument", context_settings=CONTEXT)(instrument)
    program.command("submit")(submit)
    program.command("logs")(logs)
    program.command("stop")(stop)
    program.command("fetch")(fetch)
    program.command("schema")(_schema)
    program.command("doctor")(doctor)
    return program


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print_data(f"stability-search {__version__}")
        raise typer.Exit


def _options(
    *,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    return


def _run_command(command_line: str) -> Callable[..., Work]:
    def run(  # noqa: PLR0913 - one parameter per option
        *,
        space: SpaceOption,
        overrides: SetOption = None,
        output: OutputOption = None,
        address: AddressOption = None,
        trackers: TrackerOption = None,
        dry_run: DryRunOption = False,
        json_events: JsonOption = False,
    ) -> Work:
        """Search a space, confirm the best, and say what is stable.

        A space file without `space` is one configuration, and is only confirmed.
        Exit: 0 a choice, 3 none met the bar, 2 usage, 4 machines, 5 your code, 6 out of budget.
        """

        def work() -> int:
            from stability_search import space as spaces

            if dry_run and json_events:
                raise UsageError(
                    "--dry-run, --json-events: one of them must be given, but got both; a dry run "
                    "has no events."
                )
            loaded = spaces.load(space, overrides or ())
            message_sink().write(f"space file: {inert(short_path(loaded.path))}")
            if dry_run:
                print_dry_run(loaded, output=output, address=address)
                return 0
            from stability_search.search import study

            screen = Screen(json_events=json_events)
            return screen.watch(
                tracked(
                    lambda on_event: study.run_study(
                        loaded,
                        output=output,
                        address=address,
                        command=command_line,
                        on_event=on_event,
                        on_lost=screen.end,
                    ),
                    trackers or (),
                )
            )

        return work

    return run


def _resume_command(command_line: str) -> Callable[..., Work]:
    def resume(
        *,
        run: RunArgument,
        overrides: SetOption = None,
        address: AddressOption = None,
        trackers: TrackerOption = None,
        json_events: JsonOption = False,
    ) -> Work:
        """Go on with a run that was interrupted, or with a larger budget.

        Only budgets, confirm.top and confirm.seeds may be raised; of where trials may run, only
        search.resources.labels and .custom may change.
        """

        def work() -> int:
            from stability_search.search import study

            message_sink().write(*copy_warnings(run))
            screen = Screen(json_events=json_events)
            return screen.watch(
                tracked(
                    lambda on_event: study.resume_study(
                        run,
                        overrides or (),
                        address=address,
                        command=command_line,
                        on_event=on_event,
                        on_lost=screen.end,
                    ),
                    trackers or (),
                )
            )

        return work

    return resume


def _report(
    run: RunArgument, chosen: FormatOption = Format.TABLE, figures: FiguresOption = None
) -> Work:
    """Write the tables and the report of a run again; exit 0 whatever the verdict is.

    Prints the verdict; as JSON what report.json holds, as CSV the table of configurations.
    """

    def work() -> int:
        from stability_search.search import closing

        drawing = None if figures is None else Drawing(figures)  # first: it may not be installed
        end = closing.render_run(run)
        if drawing is not None:
            drawing.draw(end.directory)
        match chosen:
            case Format.TABLE:
                print_data(*closing_lines(end))  # made inert there
            case Format.JSON:
                written = (end.directory / "report.json").read_text(encoding="utf-8")
                print_formatted(chosen, lines=(), rows=(), document=json.loads(written))
            case Format.CSV:
                from stability_search.table import records

                rows = records(end.tables().configurations)
                print_formatted(chosen, lines=(), rows=rows, document=None)
        return 0

    return work


def _schema() -> Work:
    """Print the JSON Schema of space files."""

    def work() -> int:
        from stability_search import space as spaces

        print_data(json.dumps(spaces.json_schema(), indent=2, allow_nan=False))
        return 0

    return work
