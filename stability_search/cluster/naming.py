"""A study's name on a cluster, and the ids of its attempts.

The name is made from what is sent, so that the same study has the same name on every machine. Its
first attempt has that name, a later one the name and its number.
"""

import hashlib
import re

from stability_search.cluster.parcel import Parcel
from stability_search.errors import UsageError
from stability_search.space import Space, study_identity

_DIGITS = 10
_MAX_OWN = 80  # of a study's own name
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9_.-]+")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\d+$)){0,99}")


def run_name(space: Space, parcel: Parcel) -> str:
    """Return the name of a study: its own, and a hash of its space and its task.

    Values that `resume` may raise are left out of the hash: with more trials it is the same
    study, to be gone on with.

    Args:
        space: The study's space.
        parcel: What is sent with it.
    """
    content = f"{study_identity(space)}/{parcel.task_sha256}"
    own = _NOT_IN_NAME.sub("-", space.study.name).strip("-_.")[:_MAX_OWN] or "study"
    return f"{own}-{hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]}"


def checked_name(name: str, what: str = "NAME") -> str:
    """Return a name that a user gave.

    Args:
        name: The name.
        what: The option or argument that it was given as.

    Raises:
        UsageError: It is no plain name, or looks like that of a later attempt.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{what}: letters, digits, `-`, `_` and `.` are allowed, a letter or digit first, at "
            f"most 100, not ending in a dot and digits; but got {name!r}.",
            hint="Try a name like teacher-on-a100.",
        )
    return name


def attempt_id(name: str, number: int) -> str:
    """Return the submission id of an attempt, counted from 1."""
    return name if number == 1 else f"{name}.{number}"
