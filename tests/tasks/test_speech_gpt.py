"""The token model: its form, its yardsticks, its mistakes, and that it learns."""

import collections
import dataclasses
import inspect
import itertools
import math
import re
import statistics
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import stability_search.tasks
from stability_search.engine import GuardedEngine
from stability_search.records.trial import Outcome, TrialRow, TrialSummary
from stability_search.settings.engine import EngineSettings
from stability_search.settings.trial import (
    SETTING_NAMES,
    KillRule,
    TaskReference,
    TrialConfig,
    TrialConstants,
)
from stability_search.tasks.base import (
    HasAblations,
    HasBaseline,
    HasBatchCheck,
    HasInitGainParameters,
    HasMetrics,
    Task,
)
from stability_search.tasks.gpt_model import GptNetwork
from stability_search.tasks.speech_gpt import SpeechGpt
from stability_search.tasks.texts import TokenBatch
from stability_search.testing import check_task
from stability_search.trial import Progress, run_trial

README = Path(stability_search.tasks.__file__).parent / "README.md"
SMALL = {"width": 16, "layers": 2, "heads": 2, "context": 16, "vocabulary": 272}


@cache
def small(**more: object) -> SpeechGpt:
    """Build a task in tens of milliseconds; tasks keep nothing, so tests share it."""
    return SpeechGpt(**{**SMALL, **more})  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _leave_random_state() -> object:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(task: SpeechGpt, size: int = 4) -> TokenBatch:
    return next(task.batches(size, generator()))


def model_of(task: SpeechGpt, seed: int = 3) -> GptNetwork:
    torch.manual_seed(seed)
    return task.model()


def batch_with(tokens: list[list[int]]) -> TokenBatch:
    held = torch.tensor(tokens)
    return TokenBatch(tokens=held, highest=int(held.max()), num_bytes=held[:, 1:].numel())


@pytest.mark.parametrize("more", [{}, {"heads": 0}, {"residual_scale": 3e4}], ids=str)
def test_every_form_keeps_the_contract(more: dict[str, object]) -> None:
    task = small(**more)
    assert check_task(task) == ()
    for protocol in (
        *(Task, HasBaseline, HasMetrics, HasInitGainParameters, HasAblations, HasBatchCheck),
    ):
        assert isinstance(task, protocol)
    assert len(task.probe()) >= 8


def test_no_argument_is_named_like_a_setting_or_a_column() -> None:
    columns = {
        field.name for record in (TrialRow, TrialSummary) for field in dataclasses.fields(record)
    }
    names = set(inspect.signature(SpeechGpt).parameters)
    assert names.isdisjoint(columns | set(SETTING_NAMES))


def test_every_argument_is_listed_with_its_default() -> None:
    section = README.read_text("utf-8").split("\n## `speech_gpt`\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, flags=re.MULTILINE)
    parameters = inspect.signature(SpeechGpt).parameters
    assert dict(rows) == {
        name: "none" if parameter.default is None else f"{parameter.default:g}"
        for name, parameter in parameters.items()
    }


def test_all_refused_arguments_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="width: an integer >= 1") as caught:
        SpeechGpt(width=0, layers=1.5, heads=-1, context=1, vocabulary=5000, missing_tokens=300)  # type: ignore[arg-type]
    message = str(caught.value)
    for rule in (
        "layers: an integer >= 1 must hold, but got 1.5.",
        "heads: an integer >= 0 must hold, but got -1.",
        "context: an integer >= 2 must hold, but got 1.",
        "vocabulary: an integer from 256 to 1024 must hold, but got 5000.",
        "missing_tokens: an integer from 0 to 254 must hold, but got 300.",
    ):
        assert rule in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 30}, r"width: a multiple of 4 \(heads\) must hold, but got 30"),
        ({"width": True}, r"width: an integer >= 1 must hold, but got True"),
        ({"residual_scale": 0.0}, r"residual_scale: finite and > 0 must hold, but got 0.0"),
        ({"residual_scale": math.nan}, r"residual_scale: finite and > 0"),
        ({"residual_scale": math.inf}, r"residual_scale: finite and > 0"),
    ],
)
def test_a_refused_argument_names_rule_and_value(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechGpt(**arguments)  # type: ignore[arg-type]


# -- the model -------------------------------------------------------------------------------


def test_a_place_sees_the_tokens_before_it_and_none_after() -> None:
    task = small()
    model = model_of(task).eval()
    tokens = batch_of(task).tokens[:, :-1]
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-6)
    assert not torch.allclose(before[:, 10], after[:, 10])
    assert not torch.allclose(before[:, 11:], after[:, 11:])
    # Fused attention takes `is_causal` for it; attention with a cap on its logits takes the mask.
    hidden = model.causal_mask.tolist()
    assert hidden == [[other > place for other in range(16)] for place in range(16)]


def test_without_attention_a_place_sees_its_own_token_alone() -> None:
    task = small(heads=0)
    model = model_of(task)
    assert not [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    tokens = batch_of(task).tokens[:, :-1]
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 256
    assert torch.equal(model(tokens)[:, 1:], model(changed)[:, 1:])


def test_a_residual_scale_changes_activations_and_nothing_else_in_fp32() -> None:
    plain, scaled = small(), small(residual_scale=3e4)
    left, right = model_of(plain), model_of(scaled)
    tokens = batch_of(plain).tokens[:, :-1]
    expected = left(tokens)
    torch.testing.assert_close(right(tokens), expected, rtol=0, atol=1e-3 * expected.std().item())
    written, wide = (model.blocks[0].narrow.weight for model in (left, right))
    torch.testing.assert_close(wide, 3e4 * written)


def test_init_gain_takes_the_residual_scale_out_again() -> None:
    task, plain = small(residual_scale=16.0), model_of(small())
    model = model_of(task)
    with torch.no_grad():
        for name in task.init_gain_parameters(model):
            model.get_parameter(name).mul_(1 / 16)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())


def test_norms_and_logits_stay_in_fp32_under_autocast() -> None:
    task = small()
    model = model_of(task)
    seen: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(
                lambda _module, _inputs, output: seen.append(output.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch_of(task).tokens[:, :-1])
        assert task.loss(model, batch_of(task)).dtype is torch.float32
    assert logits.dtype is torch.float32
    assert set(seen) == {torch.float32}


def test_the_engine_reaches_the_attention() -> None:
    task = small()
    settings = EngineSettings(learning_rate=1e-3, attention_logit_cap=1e-3, attention_clamp=1e-3)
    with GuardedEngine(model_of(task), settings) as engine:
        record = engine.step([batch_of(task)], task.loss)
    assert record.cap_frac is not None
    assert record.cap_frac > 0.5
    assert record.clamp_frac is not None
    assert record.clamp_frac > 0.5


def test_ablations_can_be_built() -> None:
    ablations = small().ablations()
    assert ablations == {
        "attention_bypassed": {"heads": 0},
        "smaller_model": {"layers": 1, "width": 8},
    }
    full, *fewer = (
        sum(parameter.numel() for parameter in model_of(small(**change)).parameters())
        for change in ({}, *ablations.values())
    )
    assert max(fewer) < full
    assert small(heads=0, layers=1, width=1).ablations() == {}


# -- the yardsticks --------------------------------------------------------------------------


class Constant(nn.Module):
    """Says the same at every place."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


def test_the_baseline_is_the_best_constant_prediction() -> None:
    task = small()
    counts = torch.cat([batch.tokens[:, 1:].flatten() for batch in task.probe()]).bincount(
        minlength=272
    )
    best = Constant(counts.float().clamp(min=1e-9).log())
    loss = statistics.mean(task.loss(best, batch).item() for batch in task.probe())
    assert loss == pytest.approx(task.baseline(), abs=1e-4)
    worse = Constant((counts + 5.0).log())
    assert statistics.mean(task.loss(worse, b).item() for b in task.probe()) > task.baseline()


def test_metrics_of_a_model_that_guesses() -> None:
    task = small()
    batch = task.probe()[0]
    logits = torch.zeros(272)
    found = task.metrics(Constant(logits), batch)
    num_targets = batch.tokens[:, 1:].numel()
    assert found["bits_per_byte"] == pytest.approx(
        num_targets * math.log2(272) / batch.num_bytes, rel=1e-5
    )
    often = int(batch.tokens[:, 1:].mode().values.mode().values)
    logits = torch.zeros(272).index_fill(0, torch.tensor(often), 5.0)
    share = (batch.tokens[:, 1:] == often).float().mean().item()
    assert task.metrics(Constant(logits), batch)["accuracy"] == pytest.approx(share)


def test_pieces_of_the_probe_are_not_trained_on() -> None:
    task = small()
    held_out = {tuple(piece.tolist()) for batch in task.probe() for piece in batch.tokens}
    trained = task.batches(64, generator())
    for batch in itertools.islice(trained, 20):
        assert held_out.isdisjoint(tuple(piece.tolist()) for piece in batch.tokens)


@pytest.mark.fault  # a whole training
def test_it_learns_what_ignoring_the_input_cannot() -> None:
    task = SpeechGpt()
    model = model_of(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    for batch in itertools.islice(task.batches(4, generator()), 150):
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        loss = statistics.mean(task.loss(model, batch).item() for batch in task.probe())
    accuracy = statistics.mean(task.metrics(model, b)["accuracy"] for b in task.probe())
    targets = torch.cat([batch.tokens[:, 1:].flatten() for batch in task.probe()])
    always_the_same = targets.bincount().max().item() / len(targets)
    assert loss < task.baseline() - 0.8
    assert accuracy > 2 * always_the_same


# -- a vocabulary that does not fit ----------------------------------------------------------


def test_a_token_beyond_the_models_vocabulary_is_an_error_before_the_lookup() -> None:
    task = small(missing_tokens=8)
    model = model_of(task)
    assert model.tokens.num_embeddings == 264
    assert any(batch.highest >= 264 for batch in task.probe())  # a study meets one at once
    beyond = batch_with([[264] * 17])
    for measured in (task.loss, task.metrics):
        with pytest.raises(IndexError, match=r"token ids below 264 .* but a batch has 264: the"):
            measured(model, beyond)
    task.loss(model, batch_with([[263] * 17]))  # the twin: the last one it has


def summary_of(trial: Generator[Progress, None, TrialSummary]) -> TrialSummary:
    found: list[TrialSummary] = []

    def drain() -> Iterator[Progress]:
        found.append((yield from trial))

    collections.deque(drain(), maxlen=0)
    return found[0]


def test_a_trial_with_a_vocabulary_that_does_not_fit_is_a_user_error() -> None:
    config = TrialConfig(
        task=TaskReference(module="stability_search.tasks.speech_gpt", class_name="SpeechGpt"),
        task_args={**SMALL, "missing_tokens": 8},
        kill_rule=KillRule(),
        engine=EngineSettings(learning_rate=1e-3, num_planned_steps=20),
        batch_size=4,
        num_planned_steps=20,
        timeout_s=60.0,
        seed=0,
    )
    trial = run_trial(config, constants=TrialConstants(probe_steps=(0, 20)), faults=None)
    summary = summary_of(trial)
    assert summary.outcome is Outcome.USER_ERROR
    assert "IndexError" in summary.reason


def test_a_batch_says_what_cannot_be_learned_from_it() -> None:
    task = small(missing_tokens=8)
    sound = batch_of(small()).tokens[0].clamp(max=255).tolist()
    found = task.check_batch(
        batch_with(
            [
                sound,
                [*sound[:-1], 268],
                [32, 10] * 8 + [32],
                [97] * 17,
                [97, 98, 99] * 5 + [97] * 2,
            ]
        )
    )
    assert found == [
        "sample 1: token id 268 is beyond the model's vocabulary of 264.",
        "sample 2: the text is blank.",
        "sample 3: the text repeats itself, 1 distinct tokens in 17.",
    ]


def test_the_documentation_has_nothing_that_cannot_be_learned_from() -> None:
    task = small(context=64)
    batches = [*task.probe(), *itertools.islice(task.batches(16, generator()), 5)]
    assert [finding for batch in batches for finding in task.check_batch(batch)] == []
