"""Every value of a field report stands in its space file, before and after first of all."""

from collections.abc import Mapping, Sequence

import pytest

from stability_search import space as spaces
from stability_search.records.values import Json
from stability_search.space import Space
from stability_search.space.parameter import same_value

Settings = Mapping[str, Json]

# What a team trained with when it failed, and what it changed that to.
_TEACHER = {
    "precision": "fp16",
    "batch_size": 2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "init_scale": 65536,
    "growth_interval": 2000,
    "norm": "keep",
    "fusion": "attention",
    "heads": 4,
    "hidden": 32,
    "blocks": 2,
}
_DETECTOR = {
    "precision": "fp16",
    "accumulation_steps": 4,
    "box_weight": 7.5,
    "class_weight": 0.5,
    "contrastive_weight": 1.0,
    "cpe_weight": 0.5,
    "triplet_weight": 0.2,
    "use_cpe": True,
}
_LORA = {
    "rank": 64,
    "adapter_dtype": "fp16",
    "precision": "fp16",
    "batch_size": 8,
    "accumulation_steps": 8,
    "learning_rate": 2e-5,
    "gradient_checkpointing": True,
}
_SCALER = {"precision": "fp16", "batch_size": 2, "learning_rate": 1e-5, "clip_norm": 0.5}
BEFORE_AND_AFTER: Mapping[str, tuple[Settings, Settings]] = {
    "teacher_scaler": (
        {**_SCALER, "init_gain": 1.0, "init_scale": 65536},
        {**_SCALER, "init_gain": 0.5, "init_scale": 65536},
    ),
    "teacher": (
        {
            **_TEACHER,
            "variant": "original",
            "learning_rate": 2e-4,
            "warmup_steps": 0,
            "clip_norm": 5.0,
            "init_gain": 1.0,
            "dropout": 0.1,
            "attention_dropout": 0.0,
            "attention_clamp": None,
            "attention_logit_cap": None,
        },
        {
            **_TEACHER,
            "variant": "stable",
            "learning_rate": 1e-4,
            "warmup_steps": 20,
            "clip_norm": 1.0,
            "dropout": 0.3,
            "attention_dropout": 0.1,
            "attention_clamp": 10.0,
            "attention_logit_cap": None,
        },
    ),
    "detector": (
        {
            **_DETECTOR,
            "learning_rate": 1e-5,
            "clip_norm": 1.0,
            "use_distribution_focal": True,
            "class_clamp": False,
            "box_clamp": "none",
            "cpe_clamp": "none",
        },
        {
            **_DETECTOR,
            "learning_rate": 1e-4,
            "clip_norm": 10.0,
            "use_distribution_focal": False,
            "class_clamp": True,
            "box_clamp": "all",
            "cpe_clamp": "all",
        },
    ),
    "speech_lora": ({**_LORA, "clip_norm": 1.0}, {**_LORA, "clip_norm": None}),
    "speech_gpt": (
        {"precision": "fp16", "init_scale": 65536, "growth_interval": 2000, "clip_norm": None},
        {"precision": "fp16", "init_scale": 1024, "growth_interval": 100, "clip_norm": 1.0},
    ),
}

# Whatever else a report names: each value must be reachable.
NAMED: Mapping[str, Mapping[str, Sequence[Json]]] = {
    "teacher_scaler": {
        "batch_size": [2, 1],
        "learning_rate": [1e-5, 1e-6],
        "precision": ["fp16", "fp32"],
        "init_gain": [0.5],
    },
    "teacher": {
        "learning_rate": [1e-6, 1e-5, 5e-5, 1e-4, 2e-4],
        "clip_norm": [1.0, 5.0],
        "batch_size": [1, 2],
        "precision": ["fp16", "fp32"],
        "attention_precision": ["trial", "fp32"],
        "attention_clamp": [None, 10.0],
        "attention_dropout": [0.1, 0.3],
        "dropout": [0.3, 0.5],
        "norm": ["keep", "group"],
        "fusion": ["attention", "weighted_sum"],
        "heads": [4, 2],  # 8 -> 4, at our size
        "hidden": [32, 16],  # 512 -> 256
        "blocks": [2, 1],
        "init_gain": [0.5],
        "warmup_steps": [0, 20],
    },
    "detector": {
        "class_clamp": [False, True],
        "box_clamp": ["none", "all"],
        "cpe_clamp": ["none", "similarity", "exponentials", "loss", "all"],
        "use_cpe": [True, False],
        "use_distribution_focal": [True, False],
    },
    "speech_lora": {
        "clip_norm": [None, 1.0],
        "gradient_checkpointing": [True, False],
        "batch_size": [8, 4],
        "accumulation_steps": [8, 16],
        "precision": ["fp16", "fp32", "bf16"],
    },
    "speech_gpt": {
        "init_scale": [65536, 512, 1024, 2048],
        "growth_interval": [2000, 100, 200],
        "max_scale": [2048],
        "learning_rate": [1e-6],
    },
}


def holds(space: Space, name: str, value: Json) -> bool:
    """Say whether a value is fixed, may be proposed, or is tried first."""
    for parameter in space.parameters:
        if parameter.name == name and parameter.contains(value):
            return True
    known = [
        *(start[name] for start in space.start_with if name in start),
        *([space.fixed[name]] if name in space.fixed else []),
        *([space.task_args[name]] if name in space.task_args else []),
        *([space.defaults[name]] if name in space.defaults else []),
    ]
    return any(same_value(one, value) for one in known)


@pytest.mark.parametrize("name", NAMED)
def test_every_value_of_the_report_can_be_reached(name: str) -> None:
    space = spaces.load(name)
    missing = [
        f"{setting}={value}"
        for setting, values in NAMED[name].items()
        for value in values
        if not holds(space, setting, value)
    ]
    assert not missing


@pytest.mark.parametrize("name", BEFORE_AND_AFTER)
def test_before_and_after_are_tried_first(name: str) -> None:
    space = spaces.load(name)
    for wanted, start in zip(BEFORE_AND_AFTER[name], space.start_with[:2], strict=True):
        known = {**space.defaults, **space.task_args, **space.settings(start)}
        assert {key: known.get(key) for key in wanted} == wanted


def test_a_value_that_is_nowhere_is_missed() -> None:
    """The twin: the test above can fail."""
    space = spaces.load("quickstart")
    assert holds(space, "learning_rate", 0.05)
    assert not holds(space, "learning_rate", 5.0)
    assert not holds(space, "clip_norm", 0.123)
