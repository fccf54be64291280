"""Where the task's own code is called outside of a trial: what it raises is not a bug of ours."""

import contextlib
import traceback
from collections.abc import Iterator

from stability_search.errors import StabilitySearchError, UserCodeError


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
        place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
        raise UserCodeError(
            f"task: {what} failed: {type(error).__name__}: {error}{place}.",
            hint="Mend the task, then try again.",
        ) from error
