"""What one key of a space file can get wrong, in words: unknown, of another type, out of range."""

from collections.abc import Mapping

from pydantic import ValidationError as GrammarError
from pydantic_core import ErrorDetails

from stability_search.records.values import Json
from stability_search.space.grammar import (
    AlarmsBlock,
    Block,
    ConfirmBlock,
    FloatRange,
    ParameterBlock,
    PruneBlock,
    ReportBlock,
    ResourcesBlock,
    SearchBlock,
    SpaceFile,
    TrialBlock,
)
from stability_search.space.setting_values import did_you_mean, null_hint
from stability_search.space.tree import KeyPath, Node, Problems, dotted

_BLOCKS: Mapping[KeyPath, type[Block]] = {
    (): SpaceFile,
    ("trial",): TrialBlock,
    ("search",): SearchBlock,
    ("search", "resources"): ResourcesBlock,
    ("prune",): PruneBlock,
    ("confirm",): ConfirmBlock,
    ("report",): ReportBlock,
    ("alarms",): AlarmsBlock,
    ("space", "*"): ParameterBlock,
    ("space", "*", "*"): FloatRange,
}


def shown_path(path: KeyPath) -> KeyPath:
    """Return the part of a path that a message names: a varying setting is named whole."""
    return path[:2] if path[:1] == ("space",) else path


def parse_file(tree: Node, problems: Problems) -> SpaceFile | None:
    """Check the types and ranges of every key.

    Args:
        tree: The file.
        problems: Where problems are noted.

    Returns:
        The file as typed blocks; None where something was wrong.
    """
    try:
        return SpaceFile.model_validate(tree.plain())
    except GrammarError as error:
        for detail in error.errors(include_url=False):
            _note(detail, tree, problems)
    return None


def _note(detail: ErrorDetails, tree: Node, problems: Problems) -> None:
    path: KeyPath = tuple(detail["loc"])
    kind = detail["type"]
    if kind == "missing":
        message = f"`{path[-1]}` is required, but it is missing. {_missing_hint(path)}"
        problems.add(tree.place_of(path[:-1]), shown_path(path[:-1]), message)
        return
    if kind == "extra_forbidden":
        known = _keys_of(path[:-1])
        word = str(path[-1])
        hint = did_you_mean(word, known) or f" Known here: {', '.join(known)}."
        problems.add(tree.key_place(path), shown_path(path), f"no such key.{hint}")
        return
    node = tree.at(path) or tree
    rule, hint = _rule(detail, node)
    problems.add(tree.place_of(path), shown_path(path), f"{rule}, but got {node.shown()}.{hint}")


def _missing_hint(path: KeyPath) -> str:
    if path == ("task",):
        return "Name what is trained, such as `task: teacher`."
    return f"Add `{dotted(path[-1:])}: ...`."


def _keys_of(path: KeyPath) -> list[str]:
    pattern = tuple("*" if index and path[0] == "space" else key for index, key in enumerate(path))
    return list(_BLOCKS[pattern].model_fields)


_TYPE_RULES: Mapping[str, str] = {
    "int_type": "an integer is required",
    "int_from_float": "an integer is required",
    "float_type": "a number is required",
    "string_type": "a word is required",
    "bool_type": "`true` or `false` is required",
    "list_type": "a list is required",
    "dict_type": "a mapping is required",
    "model_type": "a mapping is required",
    "model_attributes_type": "a mapping is required",
}
_LIMIT_RULES: Mapping[str, tuple[str, str]] = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


def _rule(detail: ErrorDetails, node: Node) -> tuple[str, str]:
    """Say the rule that was broken, and the way out."""
    kind = detail["type"]
    context = detail.get("ctx", {})
    value: Json = node.value if node.kind == "scalar" else None
    if kind in _TYPE_RULES:
        return _TYPE_RULES[kind], _type_hint(kind, node, detail["loc"])
    if kind in _LIMIT_RULES:
        sign, key = _LIMIT_RULES[kind]
        name = dotted(tuple(detail["loc"])[-1:])
        limit = context[key]
        limit = int(limit) if float(limit).is_integer() else limit
        hint = f" Give {limit} or more." if kind == "greater_than_equal" else ""
        hint = f" Give {limit} or less." if kind == "less_than_equal" else hint
        return f"`{name} {sign} {limit}` must hold", hint
    if kind == "literal_error":
        words = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"one of {words} is required", did_you_mean(str(value), words.split(", "))
    return detail["msg"].rstrip("."), null_hint(value, nullable=False)


_OPTIONAL_KEYS = frozenset({"time_budget_s", "step_budget", "accelerator", "epoch_steps"})


def _type_hint(kind: str, node: Node, path: KeyPath) -> str:
    if tuple(path[:1]) == ("space",) and len(path) == 2:  # noqa: PLR2004  (space.NAME)
        return " Write `{choice: [...]}`, or put one value under `fixed`."
    if node.kind == "scalar" and node.value is None and kind not in {"int_type", "float_type"}:
        return " Fill it or remove the key."
    if isinstance(node.value, float) and node.value.is_integer() and kind.startswith("int"):
        return f" Write {int(node.value)}."
    return null_hint(node.value, nullable=str(path[-1]) in _OPTIONAL_KEYS if path else False)
