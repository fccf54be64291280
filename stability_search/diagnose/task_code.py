"""Where the task's own code is called outside of a trial: what it raises is not a bug of ours."""

import contextlib
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from stability_search.errors import StabilitySearchError, UserCodeError

_PACKAGE = Path(__file__).resolve().parents[1]
_TASKS = _PACKAGE / "tasks"
_LIBRARIES = tuple(
    Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")
)
_FRAME = re.compile(r'^ *File "(?P<file>.+)", line (?P<line>\d+), in ', re.MULTILINE)

Frame = tuple[str, int]


@contextlib.contextmanager
def task_code(what: str) -> Iterator[None]:
    """Name what a task raises as the task's.

    Args:
        what: What was asked of it, in a word or two.

    Raises:
        UserCodeError: It raised anything but an error of ours.
    """
    try:
        yield
    except StabilitySearchError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        place = place_in_task([(one.filename, one.lineno or 0) for one in frames])
        raise UserCodeError(
            f"task: {what} failed: {type(error).__name__}: {error}{f' ({place})' * bool(place)}.",
            hint="Mend the task, then try again.",
        ) from error


def place_in_task(frames: Sequence[Frame]) -> str:
    """Return the innermost place in code of the task, as `file:line`.

    An error is often raised deep in torch, where nobody can mend anything.

    Args:
        frames: File and line of each call, outermost first, from one of ours on: what stands
            before it called us.

    Returns:
        The place; the innermost of all where none is the task's; empty without any.
    """
    own = [frame for frame in frames if _is_of_task(Path(frame[0]).resolve())]
    chosen = own[-1:] or list(frames[-1:])
    return "".join(f"{file}:{line}" for file, line in chosen)


def place_in_text(traceback_text: str) -> str:
    """Return what `place_in_task` does, from a printed traceback; empty where it shows none."""
    last = traceback_text.rpartition("Traceback (most recent call last)")[2]
    return place_in_task([(one["file"], int(one["line"])) for one in _FRAME.finditer(last)])


def _is_of_task(path: Path) -> bool:
    if path.is_relative_to(_PACKAGE):
        return path.is_relative_to(_TASKS)
    return path.exists() and not any(path.is_relative_to(folder) for folder in _LIBRARIES)
