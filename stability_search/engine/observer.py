"""Looking at a model without getting in its way."""

from collections.abc import Callable
from typing import TypeVar

from stability_search.engine.signals import spell_error

_Seen = TypeVar("_Seen")


class Observer:
    """Keep training going where looking at it fails, and say so once."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._failed: set[str] = set()

    def look(self, what: str, read: Callable[[], _Seen], otherwise: _Seen) -> _Seen:
        """Return what `read` sees; `otherwise` if it raises.

        Args:
            what: What is looked at, for the note.
            read: Reads a signal, and changes nothing.
            otherwise: Stands for a signal that could not be read.
        """
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - around our own hooks in a user's model
            if what not in self._failed:
                self._failed.add(what)
                self.notes.append(f"The {what} is not fully observed ({spell_error(error)}).")
            return otherwise
