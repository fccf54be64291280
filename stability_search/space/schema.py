"""The grammar as JSON Schema, for editors that check while one types."""

from typing import Any

from stability_search.records.values import Json
from stability_search.settings.engine import ENGINE_CHOICES, EngineSettings
from stability_search.settings.trial import SETTING_NAMES, TrialConfig
from stability_search.space.grammar import SpaceFile
from stability_search.space.setting_values import (
    MODULES_SETTING,
    SETTING_DEFAULTS,
    attribute_docs,
    takes_null,
    value_type,
)

_TYPES = {"number": "number", "integer": "integer", "bool": "boolean", "word": "string"}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a space file.

    It knows every key and every setting of the engine with its text; names it does not know
    may be settings of the task. Ranges of settings are left to `validate`.
    """
    schema = SpaceFile.model_json_schema()
    docs = {**attribute_docs(TrialConfig), **attribute_docs(EngineSettings)}
    properties = schema["properties"]
    properties["fixed"]["properties"] = {name: _value(name, docs[name]) for name in SETTING_NAMES}
    properties["space"]["properties"] = {
        name: {"$ref": "#/$defs/ParameterBlock", "description": docs[name]}
        for name in SETTING_NAMES
        if name != MODULES_SETTING
    }
    schema["anyOf"] = [
        {
            "required": [block],
            "properties": {block: {"required": ["learning_rate"]}},
        }
        for block in ("space", "fixed")
    ]
    schema["$defs"]["ParameterBlock"]["oneOf"] = [
        {"required": [kind]} for kind in ("choice", "uniform", "loguniform", "int", "logint")
    ]
    _drop_null_defaults(schema["$defs"]["ParameterBlock"]["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _value(name: str, doc: str) -> dict[str, Json]:
    if name == MODULES_SETTING:
        return {"type": "array", "items": {"type": "string"}, "description": doc}
    kind = _TYPES[value_type(name)]
    value: dict[str, Json] = {"type": [kind, "null"] if takes_null(name) else kind}
    if name in ENGINE_CHOICES:
        value["enum"] = list(ENGINE_CHOICES[name])
    if name in SETTING_DEFAULTS:
        value["default"] = SETTING_DEFAULTS[name]
    return {**value, "description": doc}


def _drop_null_defaults(properties: dict[str, Any]) -> None:
    """Take off `default: null` from keys that may be absent but not null."""
    for value in properties.values():
        value.pop("default", None)
