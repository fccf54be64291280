"""`main`: every way a command can end has one exit code.

0 and 3 come from the verdict, 2, 4, 5, 6, 130 and 143 from a `StabilitySearchError`, and 1 is a
bug of ours, with its traceback.
"""

import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from stability_search.cli.commands import parse
from stability_search.cli.inert import inert
from stability_search.cli.outlets import message_sink
from stability_search.errors import StabilitySearchError

EXIT_BUG = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands after `stability-search`; None takes the process's own.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    err = message_sink()
    try:
        return _run(parse(words))
    except StabilitySearchError as error:
        err.write(_line(str(error)))
        return error.exit_code
    except typer.TyperException as error:
        err.write(_line(f"{error.format_message()} See `stability-search --help`."))
        return error.exit_code
    except KeyboardInterrupt:
        err.write("interrupted")
        return EXIT_INTERRUPTED
    except Exception:  # noqa: BLE001 - the outermost boundary: a bug ends here, with all it says
        err.write(
            _line(traceback.format_exc().rstrip()),
            "This is a bug in stability-search, not in your space file or task.",
        )
        return EXIT_BUG


def _run(parsed: "int | Callable[[], int]") -> int:
    """Run what was parsed; help and the version have already been printed."""
    return parsed if isinstance(parsed, int) else parsed()


def _line(text: str) -> str:
    return inert(text, keeps_lines=True)
