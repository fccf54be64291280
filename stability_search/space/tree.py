"""A YAML text as a tree in which every key and value knows its place.

The tree is what makes `file:line:column` possible: plain Python data forget where they stood.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from stability_search.errors import Problem
from stability_search.records.values import Scalar

KeyPath: TypeAlias = tuple[str | int, ...]

# What YAML 1.2 allows in a text; the byte-order mark is taken off before.
UNPRINTABLE = re.compile(
    "[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
LINE_BREAK = re.compile("[\n\x85\u2028\u2029]")

_EXCERPT_WIDTH = 100
_SHOWN_WIDTH = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a key or a value was written.

    Attributes:
        line: From 1.
        column: From 1.
        origin: The option (`--set trial.steps=0`) it came from; empty for the file.
    """

    line: int
    column: int
    origin: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One value of the text.

    Attributes:
        kind: What it is.
        place: Where it starts.
        value: Value of a scalar.
        raw: A scalar as it was written, without its quotes.
        items: Items of a list.
        entries: Value of each key of a mapping, in the order of the text.
        key_places: Where each of these keys starts.
        span: First and last index in the text, the last excluded.
        is_flow: True for a list or mapping written in brackets.
    """

    kind: Literal["scalar", "list", "mapping"]
    place: Place
    value: Scalar = None
    raw: str = ""
    items: tuple["Node", ...] = ()
    entries: Mapping[str, "Node"] = field(default_factory=dict)
    key_places: Mapping[str, Place] = field(default_factory=dict)
    span: tuple[int, int] = (0, 0)
    is_flow: bool = False

    def plain(self) -> Any:  # noqa: ANN401  (any JSON value)
        """Return the value as JSON types, without places."""
        if self.kind == "mapping":
            return {key: node.plain() for key, node in self.entries.items()}
        if self.kind == "list":
            return [node.plain() for node in self.items]
        return self.value

    def shown(self) -> str:
        """Return the value as a message quotes it: as written, and short."""
        if self.kind != "scalar":
            return f"a {self.kind}"
        if self.value is None:
            return self.raw or "nothing"
        return shortened(repr(self.value) if isinstance(self.value, str) else self.raw)

    def child(self, key: str | int) -> "Node | None":
        """Return the value under a key or an index; None where there is none."""
        if self.kind == "list":
            return self.items[key] if isinstance(key, int) and key < len(self.items) else None
        return self.entries.get(str(key))

    def at(self, path: KeyPath) -> "Node | None":
        """Return the value under a path of keys; None where there is none."""
        node: Node | None = self
        for key in path:
            node = node.child(key) if node is not None else None
        return node

    def place_of(self, path: KeyPath) -> Place:
        """Return the place of the value under a path, or of the last part of it that exists."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                break
            node = child
        return node.place

    def key_place(self, path: KeyPath) -> Place:
        """Return the place of the key a path ends in; of the value where it has no key."""
        parent = self.at(path[:-1]) if path else None
        if parent is not None and str(path[-1]) in parent.key_places:
            return parent.key_places[str(path[-1])]
        return self.place_of(path)


def shortened(text: str, width: int = _SHOWN_WIDTH) -> str:
    """Cut a text that would drown the message, and make it printable."""
    clean = UNPRINTABLE.sub("?", LINE_BREAK.sub(" ", text))
    return clean if len(clean) <= width else f"{clean[: width - 3]}..."


def dotted(path: KeyPath) -> str:
    """Write a path of keys as a reader of the file would: `start_with[0].precision`."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += f".{shortened(key)}" if text else shortened(key)
    return text


class Problems:
    """Every problem found in one space file, each at its place.

    Args:
        file: The file as the user named it.
        text: Its text; empty where it could not be read.
    """

    def __init__(self, file: str, text: str = "") -> None:
        self._file = file
        self._lines = LINE_BREAK.split(text)
        self._found: list[tuple[tuple[bool, int, int], Problem]] = []
        self._broken: set[Place] = set()
        self._known: set[Problem] = set()  # a bomb makes thousands

    def add(self, place: Place, path: KeyPath, message: str, *, is_broken: bool = False) -> None:
        """Note a problem.

        Args:
            place: Where the caret goes.
            path: The key it is about; empty for the whole file.
            message: Rule, value received, way out.
            is_broken: True where no value could be read: what later checks say of that place
                is then left out, for it would be about a value nobody wrote.
        """
        if place in self._broken:
            return
        if is_broken:
            self._broken.add(place)
        where = place.origin or f"{self._file}:{place.line}:{place.column}"
        problem = Problem(
            where=where,
            key=dotted(path),
            message=message,
            excerpt="" if place.origin else self._excerpt(place),
        )
        if problem not in self._known:
            self._known.add(problem)
            self._found.append(((bool(place.origin), place.line, place.column), problem))

    @property
    def found(self) -> tuple[Problem, ...]:
        """All problems in the order of the text, those of `--set` last."""
        return tuple(problem for _, problem in sorted(self._found, key=lambda item: item[0]))

    def _excerpt(self, place: Place) -> str:
        if place.line > len(self._lines):
            return ""
        source = UNPRINTABLE.sub("?", self._lines[place.line - 1]).replace("\t", " ")
        if not source.strip():  # a caret under nothing shows nothing
            return ""
        column = place.column - 1
        start = max(0, column - _EXCERPT_WIDTH // 2) if len(source) > _EXCERPT_WIDTH else 0
        source = source[start : start + _EXCERPT_WIDTH]
        return f"{place.line:>5} | {source}\n{'':>5} | {' ' * (column - start)}^"
