"""The command `validate`: is a space file right, and what does it ask for."""

from typing import TYPE_CHECKING

from stability_search.cli.formats import Format, FormatOption, print_formatted
from stability_search.cli.options import SetOption, SpaceOption, Work
from stability_search.errors import Problem, SpaceError
from stability_search.records.values import Json
from stability_search.task_module import missing_part

if TYPE_CHECKING:
    from stability_search.space import Space

SCHEMA = "stability-search/validation/1"

_OURS = "stability_search.tasks."  # read like a file


def validate(
    *,
    space: SpaceOption,
    overrides: SetOption = None,
    chosen: FormatOption = Format.TABLE,
) -> Work:
    """Check a space file: every problem at once, with file, line and column.

    Nothing is imported: of a task in a package it says what was not checked.
    Exit: 0, or 2 where anything is wrong; JSON and CSV list the problems as well.
    """

    def work() -> int:
        from stability_search import space as spaces

        try:
            found = spaces.load(space, overrides or ())
        except SpaceError as error:
            if chosen is not Format.TABLE:
                _print(chosen, _document(space, error.problems), error.problems)
            raise  # printed on standard error, whatever the form
        if chosen is Format.TABLE:
            lines = [spaces.describe(found), *(f"note: {text}" for text in _notes(found))]
            print_formatted(chosen, lines=lines, rows=(), document=None)
        else:
            _print(chosen, _document(str(found.path), (), found), ())
        return 0

    return work


def _print(chosen: Format, document: Json, problems: tuple[Problem, ...]) -> None:
    rows = [{"where": p.where, "key": p.key, "message": p.message} for p in problems]
    print_formatted(chosen, lines=(), rows=rows, document=document)


def _document(
    path: str, problems: tuple[Problem, ...], space: "Space | None" = None
) -> dict[str, Json]:
    """Return what a program needs; counts are null where the file is wrong."""
    study = None if space is None else space.study
    parameters = () if space is None else space.parameters
    return {
        "schema": SCHEMA,
        "path": path,
        "is_valid": space is not None,
        "num_varying": None if space is None else len(parameters),
        "num_conditional": None if space is None else sum(bool(p.when) for p in parameters),
        "num_fixed": None if space is None else len(space.fixed),
        "trials": None if study is None or not parameters else study.search.trials,
        "trial_steps": None if study is None else study.trial_steps,
        "confirm_steps": None if study is None else study.confirm.steps,
        "confirm_seeds": None if study is None else study.confirm.seeds,
        "unchecked": None if space is None else list(space.unchecked),
        "notes": [] if space is None else [*_notes(space)],
        "problems": [
            {"where": p.where, "key": p.key, "message": p.message, "excerpt": p.excerpt}
            for p in problems
        ],
    }


def _notes(space: "Space") -> list[str]:
    """Say what nobody looked at: a task in a package is looked for, and not imported."""
    module = space.task.module
    if not module or module.startswith(_OURS):
        return []
    missing = missing_part(module)
    why = f"no module `{missing}` is found from here" if missing else "no package is imported here"
    task = f"{module}:{space.task.class_name}"
    return [f"not checked: {task}, and what its constructor takes; {why}"]
