"""`--set key.path=value`: the same file with other values, in the tree and in the text."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stability_search.records.values import Json
from stability_search.space.reading import read_tree
from stability_search.space.tree import KeyPath, Node, Place, Problems, shortened
from stability_search.space.writing import flow_text, to_yaml

_MAX_KEYS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Override:
    """One `--set` option, read.

    Attributes:
        path: The key it sets.
        value: The value, every place of which names the option.
    """

    path: KeyPath
    value: Node


def read_override(option: str, problems: Problems) -> Override | None:
    """Read `key.path=value`, the value as YAML under the limits of the file.

    Args:
        option: What followed `--set`.
        problems: Where problems are noted, with the option for a place.

    Returns:
        The override; None where it cannot be read.
    """
    origin = f"--set {shortened(option)}"
    key, equals, text = option.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > _MAX_KEYS:
        message = f"`--set` takes KEY=VALUE, but got {shortened(repr(option))}. "
        message += "Try `--set trial.steps=100`."
        problems.add(Place(line=1, column=1, origin=origin), (), message)
        return None
    path: KeyPath = tuple(int(part) if part.isdecimal() else part for part in parts)
    value = read_tree(text, problems, origin=origin, at=path)
    return None if value is None else Override(path=path, value=value)


def apply_to_tree(tree: Node, override: Override, problems: Problems) -> Node:
    """Return the tree with one value replaced or added; unchanged where that is impossible."""
    try:
        return _replaced(tree, override.path, override.value)
    except LookupError as error:
        message = f"cannot be set: {error.args[0]}."
        problems.add(override.value.place, override.path, message)
        return tree


def _replaced(node: Node | None, path: KeyPath, value: Node) -> Node:
    if not path:
        return value
    if node is None:
        node = Node(kind="mapping", place=value.place)
    key, rest = path[0], path[1:]
    if node.kind == "list":
        if not isinstance(key, int) or key >= len(node.items):
            raise LookupError(f"the list has no item {key}, it counts from 0")
        item = _replaced(node.items[key], rest, value)
        return dataclasses.replace(node, items=(*node.items[:key], item, *node.items[key + 1 :]))
    if node.kind == "scalar":
        raise LookupError(f"{node.shown()} stands where `{key}` would be a key of it")
    name = str(key)
    return dataclasses.replace(
        node,
        entries={**node.entries, name: _replaced(node.entries.get(name), rest, value)},
        key_places={**node.key_places, name: value.place},
    )


def text_with(text: str, tree: Node, overrides: Sequence[Override]) -> str:
    """Return the text of the tree, with the comments of the file.

    Only the characters of a value are replaced: a round trip through a YAML library loses
    comments, and has put two keys on one line.

    Args:
        text: The file.
        tree: The file with all overrides applied.
        overrides: They, in order.

    Returns:
        A text that reads as the tree. Comments are lost only where a value cannot be replaced
        in place, such as one behind a trailing comma.
    """
    changed = text
    for override in overrides:
        before = read_tree(changed, Problems("", changed))
        if before is None:
            break
        changed = _spliced(changed, before, override)
    return changed if not overrides or _reads_as(changed, tree.plain()) else to_yaml(tree.plain())


def _reads_as(text: str, data: Json) -> bool:
    """Compare with types and the order of keys, which `==` would not."""
    problems = Problems("", text)
    tree = read_tree(text, problems)
    return tree is not None and not problems.found and repr(tree.plain()) == repr(data)


def _spliced(text: str, tree: Node, override: Override) -> str:
    parent, depth = tree, 0
    while (child := parent.child(override.path[depth])) is not None:
        parent, depth = child, depth + 1
        if depth == len(override.path):
            start, end = parent.span
            own_line = text[:start].rpartition("\n")[2].strip(" ") == ""
            # A value at its key's column would end the mapping; an empty one touches its colon.
            gap = "  " if own_line and not parent.is_flow else " " if start == end else ""
            return text[:start] + gap + _flow(override.value) + text[end:]
    inner = _flow(override.value)
    for key in reversed(override.path[depth + 1 :]):
        inner = f"{{{flow_text(str(key))}: {inner}}}"
    return _with_key(text, parent, f"{flow_text(str(override.path[depth]))}: {inner}")


def _with_key(text: str, parent: Node, entry: str) -> str:
    end = parent.span[1]
    if parent.is_flow:
        comma = ", " if parent.entries else ""
        return f"{text[: end - 1]}{comma}{entry}{text[end - 1 :]}"
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    indent = " " * (parent.place.column - 1)
    return f"{text[:line_end]}\n{indent}{entry}{text[line_end:]}"


def _flow(node: Node) -> str:
    """Write a value on one line, its numbers as they were given."""
    if node.kind == "mapping":
        inner = (f"{flow_text(key)}: {_flow(item)}" for key, item in node.entries.items())
        return "{" + ", ".join(inner) + "}"
    if node.kind == "list":
        return "[" + ", ".join(_flow(item) for item in node.items) + "]"
    if isinstance(node.value, str) or node.value is None:
        return flow_text(node.value)
    return node.raw


def with_name(text: str, name: str) -> str:
    """Return the text with the study's name in it, so that a renamed copy keeps the name.

    Args:
        text: A right text without `name`.
        name: The name to write down.
    """
    tree = read_tree(text, Problems("", text))
    if tree is None:
        raise AssertionError("the text was read before")
    line = to_yaml({"name": name}).rstrip("\n")
    indent = " " * (tree.place.column - 1)
    lines = text.split("\n")
    is_block = not lines[tree.place.line - 1].strip().startswith(("{", "---", "?"))
    lines.insert(tree.place.line - 1, indent + line)
    named = "\n".join(lines)
    expected: Mapping[str, Json] = {"name": name, **tree.plain()}
    return named if is_block and _reads_as(named, dict(expected)) else to_yaml(expected)
