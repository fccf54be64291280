"""Settings to copy: text that parses, and says what the settings say."""

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stability_search.report.snippets import (
    as_guarded_engine,
    as_pytorch,
    as_training_arguments,
    as_yaml,
)
from tests.study_rows import settings


def keywords(call: ast.Call) -> dict[str, object]:
    return {
        word.arg: word.value.value
        for word in call.keywords
        if isinstance(word.value, ast.Constant)
    }


def only_call(text: str, name: str) -> dict[str, object]:
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return next(
        keywords(c) for c in calls if getattr(c.func, "id", getattr(c.func, "attr", "")) == name
    )


@given(st.dictionaries(st.text(max_size=6), st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8),
    st.floats(allow_nan=False, allow_infinity=False),
), max_size=5))  # fmt: skip
def test_yaml_reads_back_as_it_was(values: dict[str, object]) -> None:
    block = YAML(typ="safe", pure=True).load(as_yaml(values))
    assert (block["fixed"] or {}) == values


@pytest.mark.parametrize("word", ["null", "Yes", "off", "1e-4", "0x1", "a: b", "# x", "~", ""])
def test_text_that_yaml_reads_otherwise_is_quoted(word: str) -> None:
    assert YAML(typ="safe", pure=True).load(as_yaml({"a": word})) == {"fixed": {"a": word}}


def test_the_engine_call_holds_what_the_engine_knows() -> None:
    values = {**settings(precision="fp16", clip_norm=0.5), "hidden": 64}
    text = as_guarded_engine(values)
    found = only_call(text, "EngineSettings")
    assert found == {
        "learning_rate": 1e-3,
        "precision": "fp16",
        "init_scale": 1024,
        "clip_norm": 0.5,
    }
    assert "# hidden: 64" in text
    assert "# batch_size: 2" in text


def test_the_engine_call_is_accepted_by_the_engine() -> None:
    from stability_search.settings.engine import EngineSettings

    values = settings(precision="fp16", clip_norm=0.5)
    found = only_call(as_guarded_engine(values), "EngineSettings")
    assert EngineSettings(**found, num_planned_steps=10).init_scale == 1024


def test_plain_pytorch_unscales_before_it_clips() -> None:
    lines = as_pytorch(settings(precision="fp16", clip_norm=1.0), "cpu").splitlines()
    order = [i for i, line in enumerate(lines) for word in ("unscale_", "clip_grad", "scaler.step",
             "scaler.update", "zero_grad") if word in line]  # fmt: skip
    assert order == sorted(order)
    assert len(order) == 5
    ast.parse("\n".join(lines))


def test_plain_pytorch_of_fp32_has_no_scaler_and_no_autocast() -> None:
    text = as_pytorch(settings(clip_norm=None), "cpu")
    assert "scaler" not in text
    assert "autocast" not in text
    assert "clip_grad" not in text
    assert "loss_fn(model, micro_batch) / 2" in text


def test_a_setting_without_a_plain_line_says_what_to_do() -> None:
    text = as_pytorch(settings(attention_logit_cap=30.0), "NVIDIA H200")
    assert "# attention_logit_cap=30.0: wrap the logits in stability_search.cap_logits" in text


def test_a_setting_of_the_task_stands_in_every_form() -> None:
    values = {**settings(), "hidden": 64, "variant": "stable", "heads": None}
    for text in (as_pytorch(values, "cpu"), as_training_arguments(values)):
        assert "# hidden=64: of your task" in text
        assert "# variant='stable': of your task" in text
        assert "heads" not in text
        assert "# batch_size" not in text


def test_the_trainer_is_told_of_checkpointing_only_where_it_is_on() -> None:
    off = only_call(as_training_arguments(settings()), "TrainingArguments")
    on = only_call(
        as_training_arguments({**settings(), "gradient_checkpointing": True}), "TrainingArguments"
    )
    assert "gradient_checkpointing" not in off
    assert on["gradient_checkpointing"] is True


def test_the_trainer_is_told_that_clipping_is_off() -> None:
    found = only_call(as_training_arguments(settings(clip_norm=None)), "TrainingArguments")
    assert found["max_grad_norm"] == 0.0
    assert found["weight_decay"] == 0.01  # PyTorch's own default of AdamW; the Trainer's is 0
    assert (found["fp16"], found["bf16"]) == (False, False)


@pytest.mark.parametrize("text", ['"; import os #', "a\nb", "'''", "\\", "\u2028x"])
def test_hostile_values_stay_values(text: str) -> None:
    values = settings(clip_norm=text)
    assert only_call(as_guarded_engine(values), "EngineSettings")["clip_norm"] == text
    ast.parse(as_training_arguments({**values, "attention_logit_cap": text}))
    ast.parse(as_pytorch({**values, "attention_logit_cap": text}, "cpu"))
