"""The options that several commands share, and what a command returns."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from stability_search.cli.completing import complete_run, complete_space

Work = Callable[[], int]

SpaceOption = Annotated[
    str,
    typer.Option(
        "--space",
        metavar="FILE",
        help="Space file: a path, a name in ./search_spaces/, or one that is shipped.",
        autocompletion=complete_space,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the space file, e.g. trial.steps=50; may be repeated.",
    ),
]


def _checked_address(text: str | None) -> str | None:
    """Refuse what Ray could not join, before anything is made for it."""
    from stability_search.cluster.address import checked_join_address

    return None if text is None else checked_join_address(text)


OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        metavar="DIR",
        help="Run directory to make; default reports/NAME-TIME/.",
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="Cluster to join from one of its machines: auto, or HOST:PORT of its head; "
        "default is a Ray of its own.",
        show_default=False,
        callback=_checked_address,
    ),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and start nothing.")
]
JsonOption = Annotated[
    bool, typer.Option("--json-events", help="Make standard output JSON lines only.")
]
TrackerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="TOOL",
        help="Also log to tensorboard, mlflow or wandb; may be repeated.",
    ),
]
RunArgument = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Run directory.", autocompletion=complete_run),
]
