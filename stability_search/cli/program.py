"""`main`: every way a command can end has one exit code.

0 and 3 come from the verdict, 2, 4, 5, 6, 130 and 143 from a `StabilitySearchError`, and 1 is a
bug of ours, with its traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import typer

from stability_search.cli.commands import parse
from stability_search.cli.outlets import message_sink
from stability_search.errors import StabilitySearchError, UsageError
from stability_search.inert import inert
from stability_search.privacy import without_passwords

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
    _open_closed_streams()
    err = message_sink()
    try:
        return _run(_parsed(words))
    except StabilitySearchError as error:
        err.write(_line(str(error)))
        return error.exit_code
    except typer.TyperException as error:
        err.write(_line(_usage_line(error, words)))
        return error.exit_code
    except KeyboardInterrupt:
        err.write("interrupted")
        return EXIT_INTERRUPTED
    except Exception as problem:  # noqa: BLE001 - the outermost boundary: a bug ends here, with all it says
        if isinstance(problem, FileNotFoundError) and _is_folder_gone():
            err.write("the current folder has been removed. Change into one that is there.")
            return UsageError.exit_code
        err.write(
            _line(traceback.format_exc().rstrip()),
            "This is a bug in stability-search, not in your space file or task.",
        )
        return EXIT_BUG


def _run(parsed: "int | Callable[[], int]") -> int:
    """Run what was parsed; help and the version have already been printed."""
    return parsed if isinstance(parsed, int) else parsed()


def _parsed(words: Sequence[str]) -> "int | Callable[[], int]":
    try:
        return parse(words)
    except SystemExit:  # the reader of the help had enough
        return 0


def _is_folder_gone() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def _open_closed_streams() -> None:
    """Lead a closed standard stream nowhere.

    Else the next file that is opened, perhaps the ledger, would be what is printed into.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - for good


def _usage_line(error: typer.TyperException, words: Sequence[str]) -> str:
    """Return rule, value and way out of a wrong command line; the help where there was none."""
    text = error.format_message().replace("Value error, ", "")
    if not words:
        return text
    param = getattr(error, "param", None)
    value = _value_of(getattr(param, "opts", ()), words)
    end = "." if value is None else f", but got {value!r}."
    if value is None and text.startswith("Missing "):
        end = f". {getattr(param, 'help', None) or ''}".rstrip()
    return f"{_hidden(text.rstrip('.') + end, words)} See `stability-search --help`."


def _value_of(options: Sequence[str], words: Sequence[str]) -> str | None:
    """Return what was given for an option that takes a value; None where nothing was."""
    for index, word in enumerate(words):
        if word == "--":  # only names follow
            return None
        name, equals, value = word.partition("=")
        if name in options:
            return value if equals else "".join(words[index + 1 : index + 2]) or None
    return None


def _hidden(text: str, words: Sequence[str]) -> str:
    """Return a message without what stands before an @ in a word: a password may be there."""
    for word in words:
        for value in (word, word.partition("=")[2]):
            if "@" in value:
                host = value.rpartition("@")[2]
                for shown in (value, repr(value)[1:-1]):
                    text = text.replace(shown, f"***@{host}")
    return text


def _line(text: str) -> str:
    return inert(without_passwords(text), keeps="\n")
