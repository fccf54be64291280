"""Names that were replaced, each put back as the very object it was."""

from typing import Any


class Replacements:
    """Replace attributes of modules and classes, and remember what stood there."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, object, object]] = []

    def put(self, owner: Any, name: str, value: object) -> None:  # noqa: ANN401 - module or class
        """Replace an attribute that the owner itself holds.

        Raises:
            KeyError: It holds no such attribute.
        """
        original = vars(owner)[name]  # as stored: `getattr` would bind a method
        setattr(owner, name, value)
        self._done.append((owner, name, original, vars(owner)[name]))

    def undo(self) -> list[str]:
        """Put everything back, the last first.

        Returns:
            Names that somebody else has replaced since, and which were therefore left alone.
        """
        left = []
        for owner, name, original, ours in reversed(self._done):
            if vars(owner).get(name) is ours:
                setattr(owner, name, original)
            else:
                left.append(f"{owner.__name__}.{name}")
        self._done.clear()
        return left

    def originals(self) -> list[tuple[str, object]]:
        """Return the name and the original of every function of a module that was replaced."""
        return [
            (name, original)
            for owner, name, original, _ in self._done
            if not isinstance(owner, type)
        ]
