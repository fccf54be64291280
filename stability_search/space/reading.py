"""YAML text to tree, in one pass over the parser's events, with limits.

Limits come first: a parser that has built a hostile file has already lost. Nothing is built
beyond 64 KiB, 5,000 events or depth 20, and no anchor is ever followed.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from stability_search.records.values import Scalar
from stability_search.space.tree import (
    LINE_BREAK,
    UNPRINTABLE,
    KeyPath,
    Node,
    Place,
    Problems,
    shortened,
)

MAX_BYTES = 64 * 1024
MAX_EVENTS = 5_000
MAX_DEPTH = 20
MAX_INTEGER = 2**63 - 1  # what Parquet and JSON readers hold


def _int(raw: str) -> int:
    return int(raw, 0) if raw[1:2] in {"o", "x"} else int(raw)  # `int("010", 0)` raises


# The core schema of YAML 1.2. An integer too long for any reader is left to the check for
# finite numbers; Python itself refuses to convert one of 5,000 digits.
_FORMS: tuple[tuple[re.Pattern[str], Callable[[str], Scalar]], ...] = (
    (re.compile(r"(~|null|Null|NULL)?\Z"), lambda _: None),
    (re.compile(r"(true|True|TRUE)\Z"), lambda _: True),
    (re.compile(r"(false|False|FALSE)\Z"), lambda _: False),
    (re.compile(r"([-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40})\Z"), _int),
    (re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), lambda _: math.inf),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)\Z"), lambda _: math.inf),
    (re.compile(r"\.(nan|NaN|NAN)\Z"), lambda _: math.nan),
)


def decode(data: bytes, file: str) -> tuple[str, Problems]:
    """Turn the bytes of a file into text with plain line ends.

    Args:
        data: The first `MAX_BYTES` + 1 bytes of the file, or all if it is shorter.
        file: The file as the user named it.

    Returns:
        The text, empty where it could not be read, and the problems found so far.
    """
    start = Place(line=1, column=1)
    problems = Problems(file)
    if len(data) > MAX_BYTES:
        problems.add(start, (), "a space file holds at most 64 KiB, but got more. Is it one?")
        return "", problems
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        problems.add(start, (), "the file must be UTF-8, but got UTF-16. Save it as UTF-8.")
        return "", problems
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = _plain_line_ends(data[: error.start].decode("utf-8-sig", errors="replace"))
        problems.add(
            place_at_end(before),
            (),
            f"the file must be UTF-8, but got byte 0x{data[error.start]:02x}. Save it as UTF-8.",
        )
        return "", problems
    text = _plain_line_ends(text)
    return text, Problems(file, text)


def _plain_line_ends(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def place_at_end(text: str, origin: str = "") -> Place:
    """Return the place just behind a text."""
    lines = LINE_BREAK.split(text)
    return Place(line=len(lines), column=len(lines[-1]) + 1, origin=origin)


class _RefusedError(Exception):
    """A limit was passed: nothing more of this text is read."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place
        self.message = message


def read_tree(text: str, problems: Problems, *, origin: str = "", at: KeyPath = ()) -> Node | None:
    """Read a YAML text, noting every problem of its form.

    Args:
        text: One document.
        problems: Where problems are noted.
        origin: The `--set` option the text came from; empty for the file.
        at: The key whose value the text is; empty for the file.

    Returns:
        The tree; None where the text cannot be read as a whole.
    """
    unprintable = UNPRINTABLE.search(text)
    if unprintable:
        code = ord(unprintable.group())
        hint = "Is it UTF-16? Save it as UTF-8." if code == 0 else "Remove it."
        problems.add(
            place_at_end(text[: unprintable.start()], origin),
            at,
            f"only printable characters may stand here, but got U+{code:04X}. {hint}",
        )
        return None
    if len(text) > MAX_BYTES:
        problems.add(Place(line=1, column=1, origin=origin), at, "at most 64 KiB may stand here.")
        return None
    reader = _TreeReader(problems, origin)
    try:
        # `safe` has the same scanner as the round trip, without its handling of comments.
        return reader.read(YAML(typ="safe", pure=True).parse(text), at)
    except _RefusedError as error:
        problems.add(error.place, at, error.message)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(
            line=mark.line + 1 if mark else 1,
            column=mark.column + 1 if mark else 1,
            origin=origin,
        )
        what = shortened(str(error.problem or error.context or "cannot be read"), 120)
        problems.add(place, at, f"YAML cannot be read here: {what}. Check quotes and brackets.")
    except (YAMLError, ValueError, IndexError, TypeError, AttributeError) as error:
        # The scanner trips over a few malformed escapes and directives with bare exceptions.
        problems.add(
            Place(line=1, column=1, origin=origin),
            at,
            f"YAML cannot be read: {shortened(str(error), 120)}.",
        )
    return None


class _TreeReader:
    def __init__(self, problems: Problems, origin: str) -> None:
        self._problems = problems
        self._origin = origin
        self._events: Iterator[Event] = iter(())
        self._num_events = 0

    def read(self, events: Iterator[Event], at: KeyPath) -> Node:
        self._events = events
        root: Node | None = None
        while not isinstance(event := self._next(), StreamEndEvent):
            if isinstance(event, StreamStartEvent):
                continue
            if not isinstance(event, DocumentStartEvent):
                continue  # the end of the document
            place = self._place(event)
            if root is not None:
                raise _RefusedError(
                    place, "a space file is one document, but a second starts here."
                )
            if event.version or event.tags:
                raise _RefusedError(place, "no `%` directive may stand here. Remove it.")
            root = self._node(self._next(), at, depth=0)
        return root or Node(kind="scalar", place=Place(line=1, column=1, origin=self._origin))

    def _next(self) -> Event:
        event = next(self._events)
        self._num_events += 1
        if self._num_events > MAX_EVENTS:
            raise _RefusedError(
                self._place(event), f"a space file holds at most {MAX_EVENTS:,} YAML events."
            )
        return event

    def _place(self, event: Event) -> Place:
        mark = event.start_mark
        return Place(line=mark.line + 1, column=mark.column + 1, origin=self._origin)

    def _node(self, event: Event, path: KeyPath, depth: int) -> Node:
        place = self._place(event)
        self._refuse_references(event, place, path)
        if isinstance(event, MappingStartEvent | SequenceStartEvent) and depth >= MAX_DEPTH:
            raise _RefusedError(place, f"values may be nested {MAX_DEPTH} deep, but got more.")
        if isinstance(event, MappingStartEvent):
            return self._mapping(event, path, depth)
        if isinstance(event, SequenceStartEvent):
            return self._list(event, path, depth)
        if isinstance(event, ScalarEvent):
            return self._scalar(event, place, path)
        span = (event.start_mark.index, event.end_mark.index)
        return Node(kind="scalar", place=place, span=span)  # an alias, refused above

    def _refuse_references(self, event: Any, place: Place, path: KeyPath) -> None:  # noqa: ANN401
        if isinstance(event, AliasEvent):
            self._problems.add(
                place,
                path,
                f"aliases are refused, but got `*{shortened(event.anchor)}`. Write the value out.",
                is_broken=True,
            )
            return
        if event.anchor is not None:
            message = f"anchors are refused, but got `&{shortened(event.anchor)}`. Remove it."
            self._problems.add(place, path, message, is_broken=True)
        if event.tag is not None:
            message = f"tags are refused, but got `{shortened(str(event.tag))}`. Remove it."
            self._problems.add(place, path, message, is_broken=True)

    def _list(self, start: SequenceStartEvent, path: KeyPath, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := self._next(), SequenceEndEvent):
            items.append(self._node(event, (*path, len(items)), depth + 1))
        return Node(
            kind="list",
            place=self._place(start),
            items=tuple(items),
            span=_span(start, event, items),
            is_flow=bool(start.flow_style),
        )

    def _mapping(self, start: MappingStartEvent, path: KeyPath, depth: int) -> Node:
        entries: dict[str, Node] = {}
        key_places: dict[str, Place] = {}
        while not isinstance(event := self._next(), MappingEndEvent):
            key_place = self._place(event)
            key = self._key(event, path, depth)
            value = self._node(self._next(), (*path, key or "?"), depth + 1)
            if key is None:
                continue
            if value.kind == "scalar" and not value.raw and value.span[0] == value.span[1]:
                # The parser puts an empty value where the next token stands: call it the key's.
                behind = event.end_mark.index + 1  # the colon
                value = dataclasses.replace(value, place=key_place, span=(behind, behind))
            if key in entries:
                first = key_places[key]
                self._problems.add(
                    key_place,
                    (*path, key),
                    f"a key may stand once, but got it on line {first.line} too. Remove one.",
                )
                continue
            entries[key], key_places[key] = value, key_place
        return Node(
            kind="mapping",
            place=self._place(start),
            entries=entries,
            key_places=key_places,
            span=_span(start, event, list(entries.values())),
            is_flow=bool(start.flow_style),
        )

    def _key(self, event: Event, path: KeyPath, depth: int) -> str | None:
        node = self._node(event, path, depth + 1)
        if node.kind == "scalar" and isinstance(event, ScalarEvent):
            return node.raw
        self._problems.add(node.place, path, f"a key is a plain word, but got {node.shown()}.")
        return None

    def _scalar(self, event: ScalarEvent, place: Place, path: KeyPath) -> Node:
        raw = str(event.value)
        span = (event.start_mark.index, event.end_mark.index)
        if UNPRINTABLE.search(raw):  # written as an escape such as "\0"
            message = "only printable characters may stand here, even as an escape. Remove it."
            self._problems.add(place, path, message, is_broken=True)
            return Node(kind="scalar", place=place, span=span)
        is_plain = not event.style  # no quotes, no block
        value = self._resolved(raw, place, path) if is_plain else raw
        return Node(kind="scalar", place=place, value=value, raw=raw, span=span)

    def _resolved(self, raw: str, place: Place, path: KeyPath) -> Scalar:
        value = resolve_scalar(raw)
        if isinstance(value, float) and not math.isfinite(value):
            message = f"a finite number is required, but got {shortened(raw)}."
            self._problems.add(place, path, message, is_broken=True)
            return None
        if type(value) is int and abs(value) > MAX_INTEGER:
            message = f"an integer has at most 63 bits, but got {shortened(raw)}."
            self._problems.add(place, path, message, is_broken=True)
            return None
        return value


def _span(start: Any, end: Event, parts: list[Node]) -> tuple[int, int]:  # noqa: ANN401
    """Span a collection; one without brackets ends with its last part, before any comment."""
    first: int = start.start_mark.index
    if start.flow_style or not parts:
        return first, end.end_mark.index
    return first, parts[-1].span[1]


def resolve_scalar(raw: str) -> Scalar:
    """Read an unquoted word as YAML 1.2 does (core schema).

    Args:
        raw: The word as written.

    Returns:
        None, a bool, an int, a float (may be non-finite), or the word itself. An integer of
        more than 40 digits comes back as an infinite float, for it is refused anyway.

    Example:
        >>> [resolve_scalar(word) for word in ("1e-4", "off", "0x10", "~")]
        [0.0001, 'off', 16, None]
    """
    for pattern, convert in _FORMS:
        if pattern.match(raw):
            return convert(raw)
    return raw
