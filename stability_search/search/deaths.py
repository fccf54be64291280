"""What Ray's words about a worker that is gone mean."""

import re
from dataclasses import dataclass
from typing import Self

NODE_GONE = "its node died"
"""The reason of a trial that was lost with its whole node."""

_OUT_OF_MEMORY = "ended by Ray's memory monitor"
_MEANINGS = {  # what Ray's text holds somewhere, and what we say; the first that fits
    "running low on memory": _OUT_OF_MEMORY,
    "because its node has died": NODE_GONE,
    "because its worker process has died": "its worker died",
}
_ACTOR_ID = re.compile(r"actor_id[=:] ?([0-9a-f]{32})")
_RAISED = "ray::"  # in the first line of an exception that was raised in a worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Death:
    """What became of a worker.

    Attributes:
        reason: One line.
        actor_id: Ray's id of it; empty where Ray does not say.
        is_out_of_memory: True if Ray ended it because its node had little memory left.
        is_node_gone: True if its whole node is gone, or cannot be reached.
    """

    reason: str = "its worker died"
    actor_id: str = ""
    is_out_of_memory: bool = False
    is_node_gone: bool = False

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read Ray's error.

        Args:
            text: Its text, of any number of lines; empty where there is none.
        """
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            return cls()
        found = _ACTOR_ID.search(text)
        known = (meaning for words, meaning in _MEANINGS.items() if words in text)
        # Of an exception the last line says what it was.
        reason = next(known, lines[-1] if _RAISED in lines[0] else lines[0])
        return cls(
            reason=reason,
            actor_id=found[1] if found else "",
            is_out_of_memory=reason == _OUT_OF_MEMORY,
            is_node_gone=reason == NODE_GONE,
        )
