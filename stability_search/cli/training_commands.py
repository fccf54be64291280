"""`train`: what it takes and prints."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from stability_search.cli.options import OutputOption, SetOption, SpaceOption, Work
from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import print_data, short_path
from stability_search.errors import UsageError
from stability_search.inert import inert

StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        metavar="N",
        help="Optimizer steps; with --resume the new length, which may only rise.",
        show_default=False,
    ),
]
ResumeOption = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="DIR",
        help="Go on with the training in this directory; --set begins a new phase.",
        show_default=False,
    ),
]
FromOption = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="CHECKPOINT",
        help="With --resume: `last`, `best` (on the probe), or the name of a checkpoint.",
    ),
]
AdvanceOption = Annotated[
    int | None,
    typer.Option(
        "--advance-after",
        metavar="EPOCHS",
        help="With --resume: make the changes only after so many epochs without an alarm.",
        show_default=False,
    ),
]


def train(  # noqa: PLR0913 - one parameter per option
    *,
    space: SpaceOption = "",
    resume: ResumeOption = None,
    steps: StepsOption = None,
    overrides: SetOption = None,
    output: OutputOption = None,
    checkpoint: FromOption = "last",
    advance_after: AdvanceOption = None,
) -> Work:
    """Train one configuration for long, with the guards it was found under.

    Takes a space file without `space`, such as the best.yaml of a run; or --resume.
    Exit: 0 done, 3 a rule stopped it, 2 usage, 5 your code, 6 disk, 130 or 143 interrupted.
    """

    def work() -> int:
        if bool(space) == (resume is not None):
            raise UsageError(
                "train: either --space FILE --steps N, or --resume DIR, must be given."
            )
        if resume is not None and output is not None:
            raise UsageError("--output: a training that goes on stays in its directory.")
        if resume is None and (checkpoint != "last" or advance_after is not None):
            raise UsageError("--from, --advance-after: they need --resume DIR.")
        if resume is None and steps is None:
            raise UsageError("--steps: the length of the training is required.")
        from stability_search import space as spaces
        from stability_search.tasks.loading import look_here_too
        from stability_search.training import command

        look_here_too()

        with contextlib.redirect_stdout(sys.stderr):  # what a task prints is no data of ours
            if resume is not None:
                end = command.go_on(
                    resume,
                    overrides or (),
                    num_steps=steps,
                    which=checkpoint,
                    advance_after=advance_after,
                    listener=_say,
                )
            else:
                loaded = spaces.load(space, overrides or ())
                message_sink().write(f"space file: {inert(short_path(loaded.path))}")
                end = command.begin(loaded, num_steps=steps or 0, output=output, listener=_say)
        print_data(*(inert(line) for line in end.lines))
        return end.exit_code

    return work


def _say(line: str) -> None:
    message_sink().write(f"{time.strftime('%H:%M:%S', time.gmtime())} {inert(line)}")
