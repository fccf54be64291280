"""Looking at a model without getting in its way."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

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
            self.note(what, error)
            return otherwise

    def on_device(
        self, what: str, values: Sequence[torch.Tensor], device: torch.device
    ) -> list[torch.Tensor]:
        """Return the values that lie on a device: others cannot come to the host with them."""
        found = [value for value in values if value.device == device]
        if len(found) < len(values):
            self.note(what, f"a part of it is not on {device}")
        return found

    def note(self, what: str, error: Exception | str) -> None:
        """Say, the first time, that something could not be looked at.

        Args:
            what: As in `look`.
            error: Why.
        """
        if what not in self._failed:
            self._failed.add(what)
            reason = error if isinstance(error, str) else spell_error(error)
            self.say(f"The {what} is not fully observed ({reason}).")

    def say(self, sentence: str) -> None:
        """Keep a sentence for the reader of the log, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
