"""What the patches say: one line each on standard error, the level first.

Standard output belongs to the script. A hook of ours that fails is said and never stops the
training.
"""

import contextlib
import os
import sys
from enum import StrEnum
from types import TracebackType
from typing import TextIO

from stability_search.inert import inert


class Level(StrEnum):
    """How much a line matters."""

    INFO = "INFO"
    WARNING = "WARNING"
    CRITICAL = "CRITICAL"


class Messages:
    """Write lines, of which some are said only once.

    Args:
        is_quiet: True keeps lines back until `release`.
        rank: Number of this process in a distributed training; others than the first only warn.
    """

    def __init__(self, *, is_quiet: bool = False, rank: int = 0) -> None:
        self._kept: list[str] | None = [] if is_quiet else None
        self._rank = rank
        self._said: set[str] = set()
        self._survivals: dict[str, Survival] = {}

    def say(self, level: Level, text: str) -> None:
        """Write a line."""
        if self._rank and level is Level.INFO:
            return
        head = f"{level} [rank {self._rank}]" if self._rank else str(level)
        self._write(f"{head} {text}")

    def once(self, key: str, level: Level, text: str) -> None:
        """Write a line unless one of this key has been written."""
        if key not in self._said:
            self._said.add(key)
            self.say(level, text)

    def release(self) -> None:
        """Write what was kept back: this process does train."""
        if self._kept is None:
            return
        kept, self._kept = self._kept, None
        for line in kept:
            self._write(line)

    def survives(self, what: str) -> "Survival":
        """Return a context in which a failure of ours is said, and the training goes on.

        Args:
            what: The part, and with it what is not done.
        """
        found = self._survivals.get(what)
        if found is None:
            found = self._survivals[what] = Survival(self, what)
        return found

    def failed(self, what: str, error: Exception) -> None:
        """Say once that a part of ours failed."""
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self.once(
            f"failed {what}",
            Level.WARNING,
            f"a patch of stability-search failed ({what}: {reason}); training goes on without it",
        )

    def _write(self, line: str) -> None:
        line = inert(line)
        if self._kept is not None:
            self._kept.append(line)
            return
        # A closed stream is none of the training's business.
        with contextlib.suppress(OSError, ValueError):
            _write_around_bars(line, sys.stderr)


class Survival:
    """Around a part of ours: what it raises is said, and does not reach the training.

    A class, as it is entered several times a step and a generator would cost more.

    Args:
        messages: Where it is said.
        what: The part.
    """

    def __init__(self, messages: Messages, what: str) -> None:
        self._messages = messages
        self._what = what

    def __enter__(self) -> None:
        """Begin the part."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Say what an exception was, and end it; a wish to exit goes on."""
        if not isinstance(error, Exception):
            return False
        self._messages.failed(self._what, error)
        return True


def rank_of_process() -> int:
    """Return the rank that a launcher gave to this process; 0 without one."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def _write_around_bars(line: str, stream: TextIO) -> None:
    """Write a line; a progress bar of tqdm is drawn again below it."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if bars is not None and getattr(bars, "_instances", None):
        bars.write(line, file=stream)
    else:
        stream.write(f"{line}\n")
    stream.flush()
