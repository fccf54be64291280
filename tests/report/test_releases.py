"""`report.json` of every released version still means what its readers were told.

`releases/VERSION/` holds a file that this version wrote, and the schema it shipped. Within schema
1 keys are only added: a reader of an older schema must understand every newer file, and a reader
of today's schema every older one.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from stability_search import __version__
from stability_search.report import json_schema, render_json
from tests.report.study_reports import report_of
from tests.study_rows import empty_study, hopeless_study, interrupted_study, stable_study

RELEASES = Path(__file__).with_name("releases")
VERSIONS = sorted(path.name for path in RELEASES.iterdir())
MAKERS = [stable_study, hopeless_study, interrupted_study, empty_study]

Schema = dict[str, Any]


def stored(version: str, name: str) -> Any:  # noqa: ANN401 - any JSON
    text = (RELEASES / version / name).read_text(encoding="utf-8")
    return json.loads(text, parse_constant=pytest.fail)


def resolved(schema: Schema, root: Schema) -> Schema:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    return schema


def kinds(schema: Schema) -> set[str] | None:
    """Return the types a schema allows; None for any."""
    named = schema.get("type")
    return {named} if isinstance(named, str) else set(named) if named else None


def breaks(old: Schema, new: Schema, roots: tuple[Schema, Schema], at: str = "$") -> Iterator[str]:
    """Name every place where a file that kept one schema may not keep the other, or lost a key."""
    old, new = resolved(old, roots[0]), resolved(new, roots[1])
    yield from narrowed(old, new, at)
    mine, theirs = old.get("properties", {}), new.get("properties", {})
    for name in mine:
        if name not in theirs:
            yield f"{at}.{name}: removed"
        else:
            yield from breaks(mine[name], theirs[name], roots, f"{at}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from breaks(old[key], new[key], roots, f"{at}[{key}]")
        elif key in new and new[key] is not True and key not in old:
            yield f"{at}: {key} is new"
    for pattern, inner in old.get("patternProperties", {}).items():
        yield from breaks(inner, new["patternProperties"][pattern], roots, f"{at}[{pattern}]")
    if len(old.get("anyOf", ())) != len(new.get("anyOf", ())):
        yield f"{at}: other alternatives"
    for i, (a, b) in enumerate(zip(old.get("anyOf", ()), new.get("anyOf", ()), strict=False)):
        yield from breaks(a, b, roots, f"{at}|{i}")


def narrowed(old: Schema, new: Schema, at: str) -> Iterator[str]:
    before, after = kinds(old), kinds(new)
    if after is not None and (before is None or not before <= after):
        yield f"{at}: type {before} became {after}"
    if set(new.get("required", ())) - set(old.get("required", ())):
        yield f"{at}: requires more"
    if set(old.get("required", ())) - set(new.get("required", ())):
        yield f"{at}: promises less"
    if "enum" in new and not set(old.get("enum", [object()])) <= set(new["enum"]):
        yield f"{at}: fewer values"
    for key in ("const", "pattern"):
        if new.get(key) != old.get(key):
            yield f"{at}: another {key}"
    if new.get("minimum", float("-inf")) > old.get("minimum", float("-inf")):
        yield f"{at}: higher minimum"
    if new.get("maximum", float("inf")) < old.get("maximum", float("inf")):
        yield f"{at}: lower maximum"


def closed(schema: Any) -> Any:  # noqa: ANN401 - any part of a schema
    """Return a schema that refuses every key it does not name."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(inner) for name, inner in schema.items()}
    if "properties" in made and "required" in made:
        made.setdefault("additionalProperties", False)
    return made


def test_the_version_of_this_tree_has_its_files() -> None:
    assert __version__ in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_stored_report_still_keeps_the_schema(version: str) -> None:
    document = stored(version, "report.json")
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    assert document["environment"]["versions"]["stability-search"] == version


@pytest.mark.parametrize("version", VERSIONS)
def test_no_key_was_removed_or_narrowed_since(version: str) -> None:
    old, new = stored(version, "report.schema.json"), json_schema()
    assert list(breaks(old, new, (old, new))) == []


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_a_reader_of_any_release_understands_what_is_written_today(
    make: Callable[[], Any],
) -> None:
    document = render_json(report_of(make()))
    for version in VERSIONS:
        jsonschema.Draft202012Validator(stored(version, "report.schema.json")).validate(document)


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
def test_the_schema_names_every_key_that_is_written(make: Callable[[], Any]) -> None:
    document = render_json(report_of(make()))
    jsonschema.Draft202012Validator(closed(json_schema())).validate(document)
    document["study"]["unheard_of"] = 1
    with pytest.raises(jsonschema.ValidationError, match="unheard_of"):
        jsonschema.Draft202012Validator(closed(json_schema())).validate(document)


def edited(*steps: str, value: object = None, name: str = "") -> Schema:
    """Return today's schema with one thing in it changed, or removed where no name is given."""
    schema = copy.deepcopy(json_schema())
    *way, last = steps
    part: Any = schema
    for step in way:
        part = part[step]
    if name:
        part[last][name] = value
    else:
        del part[last]
    return schema


BEST = ("$defs", "configuration", "properties")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (edited("properties", "outcomes"), "$.outcomes: removed"),
        (edited(*BEST, "score"), "$.best|0.score: removed"),
        (
            edited("properties", "verdict", name="enum", value=["stable"]),
            "$.verdict: fewer values",
        ),
        (edited(*BEST, "score", name="type", value="number"), "$.best|0.score: type"),
        (
            edited(*BEST, "num_seeds", name="minimum", value=1),
            "$.best|0.num_seeds: higher minimum",
        ),
        (edited(*BEST, "score", name="maximum", value=99), "$.best|0.score: lower maximum"),
        (edited("properties", "schema", name="const", value="2"), "$.schema: another const"),
        (edited("properties", "files", name="required", value=[]), "$.files: promises less"),
        (
            edited("properties", "environment", name="required", value=["python"]),
            "$.environment: requires more",
        ),
        (edited("$defs", "config_id", name="pattern", value="^x"), "another pattern"),
        (edited("properties", "missed", name="items", value={"type": "null"}), "$.missed[items]"),
        (
            edited("properties", "study", name="additionalProperties", value=False),
            "$.study: additionalProperties is new",
        ),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_the_twin_a_change_that_breaks_readers_is_named(changed: Schema, found: str) -> None:
    old = json_schema()
    assert any(found in line for line in breaks(old, changed, (old, changed)))


def test_a_new_key_breaks_nobody() -> None:
    old = json_schema()
    more = edited("properties", "study", "properties", name="new", value={"type": "string"})
    assert list(breaks(old, more, (old, more))) == []


def test_what_is_no_report_is_refused() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    document = stored(__version__, "report.json")
    assert validator.is_valid(document)
    for name, value in (
        ("best", None), ("exit_code", 3), ("verdict", "good"), ("outcomes", {}),
        ("schema", "stability-search/report/2"), ("warnings", None), ("study", {}),
    ):  # fmt: skip
        assert not validator.is_valid({**document, name: value}), name
