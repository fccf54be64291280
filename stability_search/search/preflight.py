"""Which settings a model may be unable to honour, as configurations to try for one step."""

from collections.abc import Mapping
from typing import Literal

from stability_search.records.values import Json
from stability_search.settings.trial import SETTING_NAMES, TrialConfig
from stability_search.space import Space

# What a model may be unable to honour, and the values that ask for it; None for any number.
_DEMANDING: Mapping[str, tuple[Json, ...]] = {
    "precision": ("bf16",),
    "attention_clamp": (None,),
    "attention_logit_cap": (None,),
    "attention_precision": ("fp32",),
    "norm": ("group",),
    "gradient_checkpointing": (True,),
}


def preflight_configs(space: Space, *, device: Literal["cpu", "cuda"]) -> tuple[TrialConfig, ...]:
    """Return a configuration for every setting that a model may be unable to honour.

    Each is tried with every value of every setting of the task, since those decide what the
    model is made of.

    Args:
        space: The study's space.
        device: Device of the trials.
    """
    base = {
        name: value
        for name, value in space.pilot_settings().items()
        if name in space.varying and value is not None
    }
    models = [base] + [
        {**base, parameter.name: value}
        for parameter in space.parameters
        if parameter.name not in SETTING_NAMES
        for value in parameter.choices
    ]
    demands = [
        {name: allowed[0] for name, allowed in parameter.when.items()}
        | {parameter.name: parameter.largest_number() if value is None else value}
        for parameter in space.parameters
        if parameter.name in _DEMANDING
        for value in _DEMANDING[parameter.name]
        if value is None or parameter.contains(value)
    ]
    settings = [
        space.settings(_complete(space, {**model, **demand}))
        for model in models
        for demand in demands
    ]
    fixed = [space.settings(_complete(space, model)) for model in models]
    unique = {space.config_id(one): one for one in [*fixed, *settings]}
    return tuple(
        space.trial_config(one, seed=0, steps=space.study.trial_steps, device=device)
        for one in unique.values()
    )


def _complete(space: Space, values: Mapping[str, Json]) -> dict[str, Json]:
    """Give settings that have become active their middle value."""
    return {p.name: values.get(p.name, p.middle()) for p in space.parameters}
