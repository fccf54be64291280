"""Every setting on models that nobody wrote for the engine: it acts, or it is refused clearly."""

from typing import Any

import pytest
import torch
from torch import nn

from stability_search.engine import GuardedEngine
from stability_search.errors import UsageError
from stability_search.settings.engine import ENGINE_SETTING_NAMES, EngineSettings
from tests.engine.foreign_checks import CHECKS, train
from tests.engine.foreign_models import MODELS, Foreign

pytestmark = pytest.mark.fault  # whole trainings, or models of other libraries

# Which settings do what, by row; `@` stands for the model's attention modules. A word other than
# `acts` says how the setting is refused.
TABLE = """
                            resnet  mobilenet transformer fused  by_hand  opted_in  llama_hf llama_eager_hf gpt2_hf gpt2_eager_hf
learning_rate               acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
optimizer=adamw             acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
optimizer=adam              acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
optimizer=sgd               acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
weight_decay                acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
beta1                       acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
beta2                       acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
momentum                    acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
eps                         acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
warmup_steps                acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
schedule=linear             acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
schedule=cosine             acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
precision=fp32              acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
precision=bf16              acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
precision=fp16              acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
fp16_on_cpu=native          acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
init_scale                  acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
growth_interval             acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
max_scale                   acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
clip_norm                   acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
attention_clamp             modules modules   acts        modules modules modules   modules  modules        modules modules
attention_clamp@            match   match     acts        acts   acts     acts      acts     acts           acts    acts
attention_logit_cap         none    none      acts        acts   softmax  acts      acts     softmax        acts    softmax
attention_logit_cap@        match   match     acts        acts   softmax  acts      acts     softmax        acts    softmax
attention_precision         modules modules   acts        modules modules modules   modules  modules        modules modules
attention_precision@        match   match     acts        acts   acts     acts      acts     acts           acts    acts
attention_modules=lists     match   match     lists       lists  lists    lists     lists    lists          match   match
init_gain                   acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
norm                        acts    acts      norm        norm   norm     norm      norm     norm           norm    norm
gradient_checkpointing      acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
bad_microbatch=skip         acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
bad_microbatch=drop         acts    acts      acts        acts   acts     acts      acts     acts           acts    acts
"""  # noqa: E501 - a table

REFUSALS = {
    "modules": r"needs attention modules to act on, but the model has no nn.MultiheadAttention\. "
    r"Name its attention in attention_modules",
    "match": r"attention_modules: .* but no module of the model matches .* Compare with the names",
    "lists": r"attention_modules: .* but only lists of modules match .* Compare with the names",
    "none": r"attention_logit_cap: a cap of 0.01 needs attention .* no attention of the model went"
    r" through nn.MultiheadAttention.*cap_logits on the logits",
    "softmax": r"attention_logit_cap: all attention must go through .* for a cap of 0.01 to act, "
    r"but .*(layers|h)\.0\.\S+ \(\w*Attention\) takes a softmax of its own. Load a Hugging Face "
    r'model with attn_implementation="sdpa".*cap_logits',
    "norm": r"norm: `group` replaces BatchNorm, but the model has none. Leave it at keep",
}

# The one setting of the engine that a trial, not a step, obeys.
NOT_OF_A_STEP = {"max_bad_steps"}


def _rows() -> list[tuple[str, str, str]]:
    header, *lines = TABLE.strip().splitlines()
    columns = header.split()
    cells = []
    for line in lines:
        row, *words = line.split()
        cells += [(row, model, word) for model, word in zip(columns, words, strict=True)]
    return cells


def _cell(row: str, model: str, word: str) -> Any:
    # transformers takes seconds to import, and the other two are relatives of models beside them.
    is_slow = model.endswith("_hf") or model in {"mobilenet", "opted_in"}
    marks = [pytest.mark.fault] if is_slow else []
    return pytest.param(row, model, word, marks=marks, id=f"{row}-{model}")


def test_the_table_has_a_cell_for_every_setting_and_model() -> None:
    cells = _rows()
    assert {model for _, model, _ in cells} == set(MODELS)
    settings = {row.rstrip("@").split("=")[0] for row, _, _ in cells}
    assert settings == set(ENGINE_SETTING_NAMES) - NOT_OF_A_STEP
    assert {word for _, _, word in cells} == {"acts", *REFUSALS}
    assert {row for row, _, _ in cells} == set(CHECKS)


@pytest.mark.parametrize(("row", "model", "word"), [_cell(*cell) for cell in _rows()])
def test_a_setting_acts_or_is_refused_before_a_parameter_changes(
    row: str, model: str, word: str
) -> None:
    check, foreign = CHECKS[row], MODELS[model]
    if word == "acts":
        check.act(foreign)
        return
    built = foreign.build()
    before = [parameter.clone() for parameter in built.parameters()]
    with pytest.raises(UsageError, match=REFUSALS[word]):
        train(foreign, model=built, **check.settings(foreign))
    assert all(map(torch.equal, before, built.parameters()))


# -- what no single setting shows ------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen layer and a low-rank correction that is trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def adapted(foreign: Foreign) -> nn.Module:
    """Load the model in fp16, freeze it and add adapters to its attention, in fp16 too."""
    model = foreign.build().half().requires_grad_(requires_grad=False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in {"q_proj", "v_proj", "qkv"}:
                setattr(module, name, LoRA(child))
    return model


@pytest.mark.parametrize("name", ["fused", pytest.param("llama_hf", marks=[pytest.mark.fault])])
@pytest.mark.parametrize("fp16_on_cpu", ["emulated", "native"])
def test_adapters_of_a_frozen_fp16_model_train_with_checkpointing_and_clipping(
    name: str, fp16_on_cpu: str
) -> None:
    foreign = MODELS[name]
    model = adapted(foreign)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    ours = EngineSettings(
        learning_rate=0.03,
        precision="fp16",
        fp16_on_cpu=fp16_on_cpu,  # type: ignore[arg-type]
        init_scale=1024,
        gradient_checkpointing=True,
        clip_norm=1.0,
    )
    with GuardedEngine(model, ours) as engine:
        (before,) = engine.evaluate([foreign.batch], foreign.loss)
        records = [engine.step([foreign.batch], foreign.loss) for _ in range(20)]
        (after,) = engine.evaluate([foreign.batch], foreign.loss)
        notes = engine.notes
    assert {record.label.value for record in records} == {"ok"}
    assert before is not None
    assert after is not None
    assert after < before - 0.05
    assert [note.split(" were")[0].split(" stay")[0] for note in notes] == [
        f"{len(list(model.parameters())) - len(frozen)} trainable parameters",
        f"{_num_half(model)} frozen parameters and buffers",
    ]
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter_name not in frozen)
        if parameter_name in frozen:
            assert torch.equal(parameter.to(torch.float16), frozen[parameter_name])
        else:
            assert parameter.dtype == torch.float32


def _num_half(model: nn.Module) -> int:
    return sum(t.dtype == torch.float16 for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", ["fused", pytest.param("llama_hf", marks=[pytest.mark.fault])])
def test_plain_pytorch_refuses_to_train_those_adapters(name: str) -> None:
    """The twin: GradScaler cannot unscale gradients of fp16 weights."""
    foreign = MODELS[name]
    model = adapted(foreign)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trained), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = foreign.loss(model, foreign.batch)
    scaler.scale(loss).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


@pytest.mark.fault
@pytest.mark.parametrize("name", ["llama_hf", "llama_eager_hf", "gpt2_hf", "gpt2_eager_hf"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_model_loaded_in_half_precision_trains_in_every_precision(
    name: str, dtype: torch.dtype, precision: str
) -> None:
    foreign = MODELS[name]
    settings = EngineSettings(learning_rate=0.01, precision=precision, clip_norm=1.0)  # type: ignore[arg-type]
    with GuardedEngine(foreign.build().to(dtype), settings) as engine:
        records = [engine.step([foreign.batch], foreign.loss) for _ in range(3)]
        (loss,) = engine.evaluate([foreign.batch], foreign.loss)
        assert {p.dtype for p in engine.model.parameters()} == {torch.float32}
    assert {record.label.value for record in records} <= {"ok", "calibration"}
    assert loss is not None
    assert records[0].loss == pytest.approx(3.5, abs=0.1)
    assert loss < 3.4


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # what torch.compile says of its own tensors
@pytest.mark.parametrize("name", ["plain", "attention_logit_cap", "gradient_checkpointing"])
def test_a_model_of_compiled_layers_trains_as_an_eager_one(name: str) -> None:
    more = {
        "plain": {},
        "attention_logit_cap": {"attention_logit_cap": 0.01},
        "gradient_checkpointing": {"gradient_checkpointing": True},
    }[name]
    foreign = MODELS["fused"]
    compiled = foreign.build()
    for layer in compiled.layers:  # type: ignore[union-attr]
        layer.compile(backend="eager")
    found = []
    for model in (compiled, foreign.build()):
        with GuardedEngine(model, EngineSettings(learning_rate=0.01, **more)) as engine:
            records = [engine.step([foreign.batch], foreign.loss) for _ in range(3)]
        found.append([(record.loss, record.cap_frac) for record in records])
    assert found[0] == found[1]


@pytest.mark.fault
def test_a_hugging_face_model_inside_another_is_checkpointed_as_it_asks_to_be() -> None:
    """Blocks run twice from outside would write into a cache twice."""
    foreign = MODELS["llama_hf"]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language = foreign.build()
            self.language.config.use_cache = True

        def forward(self, **batch: Any) -> Any:
            return self.language(**batch)

    found = []
    for is_on in (False, True):
        settings = EngineSettings(learning_rate=0.01, gradient_checkpointing=is_on)
        with GuardedEngine(Wrapped(), settings) as engine:
            assert engine.model.language.is_activation_checkpointing == is_on
            found += [engine.step([foreign.batch], foreign.loss).loss for _ in range(2)]
        assert not engine.model.language.is_activation_checkpointing
    assert found[:2] == found[2:]
