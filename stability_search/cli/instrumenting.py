"""`instrument`: a training command with the patches in it, and nothing of it edited."""

import os
import shutil
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from stability_search.cli.options import Work
from stability_search.cli.outlets import message_sink
from stability_search.errors import UsageError
from stability_search.patches.settings import ALARM_SETTING_NAMES, PatchSettings, variable

CONTEXT = {"allow_interspersed_args": False}  # what follows the program is the program's own


def _value(name: str, metavar: str, text: str) -> typer.models.OptionInfo:
    """Return an option whose value is checked with all the others, by `PatchSettings`."""
    option: typer.models.OptionInfo = typer.Option(
        name, metavar=metavar, help=text, show_default=False
    )
    return option


_Words = Annotated[
    list[str],
    typer.Argument(
        metavar="[--] PROGRAM [ARGS]...", help="The training command, as you call it now."
    ),
]
_Observe = Annotated[bool, typer.Option("--observe", help="Say everything, change nothing.")]
_Anomaly = Annotated[
    bool, typer.Option("--anomaly", help="Name the operation that gives NaN; about 30 % slower.")
]
_InitScale = Annotated[
    str | None, _value("--init-scale", "X", "First loss scale; default 1024 or the script's own.")
]
_GrowthInterval = Annotated[
    str | None,
    _value("--growth-interval", "N", "Good steps until it doubles; default 100 or its own."),
]
_MinScale = Annotated[str | None, _value("--min-scale", "X", "Its lower limit; default 1.")]
_MaxScale = Annotated[str | None, _value("--max-scale", "X", "Its upper limit; default none.")]
_EverySteps = Annotated[
    str | None, _value("--every-steps", "N", "Steps between two lines of progress; default 500.")
]
_Alarms = Annotated[
    list[str] | None,
    _value("--alarm", "NAME=VALUE", "Threshold of an alarm, e.g. grad_norm=10; may be repeated."),
]


def instrument(  # noqa: PLR0913 - one parameter per option
    *,
    words: _Words,
    observe: _Observe = False,
    anomaly: _Anomaly = False,
    init_scale: _InitScale = None,
    growth_interval: _GrowthInterval = None,
    min_scale: _MinScale = None,
    max_scale: _MaxScale = None,
    every_steps: _EverySteps = None,
    alarms: _Alarms = None,
) -> Work:
    """Run a training command with the guards inside it: NaN is skipped, labelled and counted.

    Its output, its signals and its exit code are its own. Messages go to standard error.
    """

    def work() -> int:
        given = {
            "observe": "1" if observe else None,
            "anomaly": "1" if anomaly else None,
            "init_scale": init_scale,
            "growth_interval": growth_interval,
            "min_scale": min_scale,
            "max_scale": max_scale,
            "every_steps": every_steps,
            **_alarm_values(alarms or ()),
        }
        environment = instrumented(os.environ, given)
        path = shutil.which(words[0])
        if path is None:
            raise UsageError(
                f"{words[0]}: no such program.",
                hint="Write the command as you call it now, e.g. `-- python train.py`.",
            )
        message_sink().write(
            "INFO every Python process of this command that trains with torch is patched, and "
            "says so at its first step"
        )
        # It takes this process's place: signals, terminal and exit code are its own.
        os.execve(path, words, environment)  # noqa: S606 - the command the user gave
        raise AssertionError("execve returned")

    return work


def instrumented(
    environment: Mapping[str, str], given: Mapping[str, str | None]
) -> dict[str, str]:
    """Return an environment in which Python processes patch themselves once they load torch.

    Args:
        environment: The present one.
        given: Settings of the patches by name; None leaves what the environment says.

    Raises:
        UsageError: A setting cannot be honoured; all of them are listed.
    """
    settings = {variable(name): value for name, value in given.items() if value is not None}
    changed = {**environment, **settings}
    PatchSettings.from_environment(changed)
    folder = Path(str(resources.files("stability_search.patches") / "startup"))
    behind = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    return {**changed, "PYTHONPATH": os.pathsep.join([str(folder), *behind])}


def _alarm_values(words: Sequence[str]) -> dict[str, str]:
    """Read `NAME=VALUE` words.

    Raises:
        UsageError: A word has no `=`, or names no alarm.
    """
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in ALARM_SETTING_NAMES:
            raise UsageError(
                f"--alarm: NAME=VALUE must hold, NAME one of {', '.join(ALARM_SETTING_NAMES)}, "
                f"but got {word!r}."
            )
        values[f"alarms.{name}"] = value
    return values
