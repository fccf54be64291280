"""The command `diagnose`: what breaks this training, and does it learn a handful by heart."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stability_search.cli.options import OutputOption, SetOption, SpaceOption, Work
from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import print_data, short_path
from stability_search.inert import inert

if TYPE_CHECKING:
    from stability_search.interruption import Signals
    from stability_search.space import Space

OverfitOption = Annotated[
    bool,
    typer.Option("--overfit", help="Only test that a handful of samples is learned by heart."),
]


def diagnose(
    *,
    space: SpaceOption,
    overrides: SetOption = None,
    output: OutputOption = None,
    overfit: OverfitOption = False,
) -> Work:
    """Find what breaks a training: data, precision, attention, rate or BatchNorm.

    The file's one configuration is diagnosed, else the first of `start_with`, else defaults.
    Exit: 0 cause named or healthy, 3 fails for no cause found, 2 usage, 5 your code.
    With --overfit: 0 learned by heart, 3 not.
    """

    def work() -> int:
        from stability_search.diagnose.session import load_space
        from stability_search.interruption import Signals
        from stability_search.tasks.loading import look_here_too

        look_here_too()
        loaded = load_space(space, overrides or ())
        message_sink().write(f"space file: {inert(short_path(loaded.path))}")
        signals = Signals()
        signals.install()
        try:
            if overfit:
                return _run_overfit(loaded, output, signals)
            return _run_diagnosis(loaded, overrides or (), output, signals)
        finally:
            signals.restore()

    return work


def _say(line: str) -> None:
    message_sink().write(inert(line))


def _run_diagnosis(
    loaded: "Space", overrides: Sequence[str], output: Path | None, signals: "Signals"
) -> int:
    from stability_search.diagnose.document import terminal_lines
    from stability_search.diagnose.session import diagnose as find

    end = find(loaded, output=output, overrides=overrides, say=_say, check=signals.check)
    print_data(*(inert(line) for line in terminal_lines(end.diagnosis)))
    print_data(f"report: {inert(short_path(end.directory / 'diagnosis.md'))}")
    return end.diagnosis.exit_code


def _run_overfit(loaded: "Space", output: Path | None, signals: "Signals") -> int:
    from stability_search.diagnose.session import overfit_test

    directory, result = overfit_test(loaded, output=output, say=_say, check=signals.check)
    print_data(*(inert(line) for line in result.lines()))
    print_data(f"report: {inert(short_path(directory / 'overfit.json'))}")
    return result.exit_code
