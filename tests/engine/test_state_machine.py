"""Whatever is planted, and wherever it is saved and loaded, the engine does what the rules say.

A Hypothesis state machine plants faults in windows of any size, in every precision, saves, loads,
closes and reopens, and compares every step with `slow_engine.SlowEngine` and with an engine that
was never interrupted.
"""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stability_search.engine import GuardedEngine, emulation, guards, precision, rollback, signals
from stability_search.settings.engine import EngineSettings
from tests.engine import slow_engine as slow
from tests.engine.plain import same, state_of
from tests.engine.planted_net import DROPOUT, SIZE, WIDTH, Net, loss_fn, make_batch
from tests.engine.slow_engine import Planted, SlowEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -- the machine -----------------------------------------------------------------------------

# Above 2^7 every gradient overflows, so that nothing overflows that was not planted.
limits = st.sampled_from([90.5, 90.5, 90.5, 11.3, 1.7])
clean = st.builds(Planted, limit=limits)
planted = st.builds(Planted, fault=st.sampled_from(slow.FAULTS), limit=limits)
windows = st.one_of(
    st.lists(clean, min_size=1, max_size=4),
    st.lists(clean | planted, min_size=1, max_size=4),
    st.lists(planted, min_size=1, max_size=4),
)


def chosen_settings(*, init_scale: float, max_scale: float | None, **more: Any) -> EngineSettings:
    if max_scale is not None:
        init_scale = min(init_scale, max_scale)
    return EngineSettings(
        learning_rate=0.01,
        num_planned_steps=40,
        init_scale=init_scale,
        max_scale=max_scale,
        **more,
    )


def engine_settings(
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16", "fp16", "fp16"),
) -> st.SearchStrategy[EngineSettings]:
    return st.builds(
        chosen_settings,
        precision=st.sampled_from(precisions),
        fp16_on_cpu=st.sampled_from(["emulated", "emulated", "emulated", "native"]),
        optimizer=st.sampled_from(["adamw", "sgd"]),
        momentum=st.sampled_from([0.0, 0.9]),
        warmup_steps=st.sampled_from([0, 5]),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        init_scale=st.sampled_from([1.0, 2.0, 16.0, 64.0, 4096.0]),
        growth_interval=st.sampled_from([1, 3, 25, 2000]),
        max_scale=st.sampled_from([None, 64.0, 100.0]),
        clip_norm=st.sampled_from([None, 0.05]),
        bad_microbatch=st.sampled_from(["skip", "drop"]),
    )


class Machine(RuleBasedStateMachine):
    """Drive a guarded engine, a slow one, and, after a load, one that was never interrupted."""

    settings_of_engine = engine_settings()

    def __init__(self) -> None:
        super().__init__()
        self.engine: GuardedEngine
        self.slow: SlowEngine
        self.twin: GuardedEngine | None = None
        self.saved: tuple[bytes, SlowEngine]
        self.num_batches = 0

    @initialize(data=st.data(), has_reference=st.booleans())
    def start(self, data: st.DataObject, *, has_reference: bool) -> None:
        chosen = data.draw(self.settings_of_engine)
        self.slow = SlowEngine(settings=chosen, has_reference=has_reference)
        self.engine = self.new_engine(Net())
        torch.manual_seed(1)
        self.save()

    def new_engine(self, model: Net) -> GuardedEngine:
        build = functools.partial(Net, is_reference=True)
        reference = build if self.slow.has_reference else None
        return GuardedEngine(model, self.slow.settings, reference=reference)

    def save(self) -> None:
        file = io.BytesIO()
        torch.save(self.engine.state_dict(), file)
        self.saved = (file.getvalue(), self.slow.copied())

    def load(self, engine: GuardedEngine) -> None:
        engine.load_state_dict(torch.load(io.BytesIO(self.saved[0]), weights_only=True))

    @precondition(lambda self: self.slow.ended is None)
    @rule(several=st.lists(windows, min_size=1, max_size=6))
    def train(self, several: list[list[Planted]]) -> None:
        self.take_all(several)

    def take_all(self, several: list[list[Planted]]) -> None:
        for window in several:
            if self.slow.ended is None:
                self.take(window)

    @precondition(lambda self: self.slow.ended is None)
    @rule(num_steps=st.sampled_from([2, 4, 21]), size=st.sampled_from([1, 1, 3]))
    def train_calmly(self, num_steps: int, size: int) -> None:
        self.take_all([[Planted(limit=90.5)] * size] * num_steps)

    def take(self, window: list[Planted]) -> None:
        batches = [make_batch(b, self.num_batches + k) for k, b in enumerate(window)]
        self.num_batches += len(window)
        random_before, before = torch.get_rng_state(), state_of(self.engine)
        expected = self.slow.step(window)
        record = self.engine.step(batches, loss_fn)
        found = {name: getattr(record, name) for name in _COMPARED}
        wanted = {name: getattr(expected, name) for name in _COMPARED}
        assert found == pytest.approx(wanted), f"the record of step {record.step} is wrong"
        assert record.is_loss_finite or record.label != "ok"
        assert (record.loss is None) == (not record.is_loss_finite)
        assert record.is_transient is not True, "what is planted is there the second time too"
        json.dumps(record.to_json(), allow_nan=False)
        if not record.is_applied:
            assert is_unchanged(state_of(self.engine), before), "a skipped step left a trace"
        random_after = torch.get_rng_state()
        torch.set_rng_state(random_before)
        self.draw_like(expected.num_forward)
        assert torch.equal(torch.get_rng_state(), random_after), "the random state is another"
        self.check_counters()
        if self.twin is not None:
            torch.set_rng_state(random_before)
            again = self.twin.step(batches, loss_fn)
            assert without_time(again) == without_time(record), "the twin's record is another"
            assert same(
                without_nan(self.twin.state_dict()), without_nan(self.engine.state_dict())
            ), "the twin's state is another"

    def draw_like(self, num_forward: int) -> None:
        """Draw what so many forward passes draw, and nothing else may."""
        for _ in range(num_forward):
            F.dropout(torch.ones(SIZE, WIDTH, dtype=DTYPES[self.slow.settings.precision]), DROPOUT)

    def check_counters(self) -> None:
        engine, wanted = self.engine, self.slow
        state = engine.state_dict()
        if not wanted.is_poisoned:
            is_finite = all(bool(torch.isfinite(leaf).all()) for leaf in tensors_of(state))
            assert is_finite, "a parameter, buffer or optimizer state is not finite"
        counters = (state["num_steps"], state["num_applied"])
        assert counters == (wanted.num_steps, wanted.num_applied), "a counter is wrong"
        assert engine.scale == wanted.scale, "the loss scale is wrong"
        limit = wanted.settings.max_scale
        if engine.scale is not None and limit is not None:
            assert engine.scale <= limit, "the loss scale is above max_scale"
        assert state["proof"]["proven_scale"] == wanted.proven_scale, "the proven scale is wrong"
        assert (engine.ended and engine.ended[0].value) == wanted.ended, "the end is wrong"

    @precondition(lambda self: self.slow.ended is None)
    @rule()
    def save_a_checkpoint(self) -> None:
        self.save()

    @precondition(lambda self: self.slow.ended is None)
    @rule(reopens_model=st.booleans(), several=st.lists(windows, min_size=1, max_size=6))
    def go_on_in_a_new_engine(self, several: list[list[Planted]], *, reopens_model: bool) -> None:
        """The old engine is the twin from then on, unless its model is taken over."""
        self.save()
        if reopens_model:
            self.engine.close()
            with pytest.raises(ValueError, match="it must be open"):
                self.engine.step([make_batch(Planted(limit=1.0), 0)], loss_fn)
            model = self.engine.model
        else:
            if self.twin is None:
                self.twin = self.engine
            else:
                self.engine.close()
            model = Net(seed=9)
        self.engine = self.new_engine(model)
        torch.manual_seed(self.num_batches)
        self.load(self.engine)
        assert same(self.engine.state_dict()["random"], torch.get_rng_state())
        self.check_counters()
        self.take_all(several)

    @precondition(lambda self: self.slow.ended is None)
    @rule(window=windows)
    def poison_a_parameter(self, window: list[Planted]) -> None:
        for engine in (self.engine, self.twin):
            if engine is not None:
                with torch.no_grad():
                    engine.model.last.weight[0, 0] = math.nan
        self.slow.is_poisoned = True
        self.take(window)

    @precondition(lambda self: self.slow.ended is not None)
    @rule()
    def go_back(self) -> None:
        """An engine that has ended refuses to go on; a checkpoint is the way back."""
        with pytest.raises(ValueError, match="must not have ended"):
            self.engine.step([make_batch(Planted(limit=1.0), 0)], loss_fn)
        self.slow = self.saved[1].copied()
        for engine in (self.twin, self.engine):
            if engine is not None:
                self.load(engine)
        self.check_counters()

    @rule()
    def evaluate(self) -> None:
        before, random_before = state_of(self.engine), torch.get_rng_state()
        (loss,) = self.engine.evaluate([make_batch(Planted(limit=1.0), 0)], loss_fn)
        assert (loss is None) == self.slow.is_poisoned
        assert is_unchanged(state_of(self.engine), before), "a measurement left a trace"
        assert torch.equal(torch.get_rng_state(), random_before), "a measurement drew numbers"

    def teardown(self) -> None:
        for engine in (getattr(self, "engine", None), self.twin):
            if engine is not None:
                engine.close()
        assert not emulation.is_installed()


_COMPARED = ("label", "is_applied", "step", "learning_rate", "scale", "batch_index")


def without_time(record: Any) -> dict[str, Any]:
    return {name: value for name, value in record.to_json().items() if name != "step_s"}


def tensors_of(nest: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(nest)  # noqa: SLF001 - the leaves of a nest
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def is_unchanged(after: dict[str, Any], before: dict[str, Any]) -> bool:
    """Compare to the bit."""
    return same(without_nan(after), without_nan(before))


def without_nan(nest: Any) -> Any:
    """Make a planted NaN comparable: NaN equals nothing, not even itself."""
    return torch.utils._pytree.tree_map(  # noqa: SLF001 - a copy of a nest of tensors
        lambda leaf: leaf.nan_to_num(nan=12345.0) if isinstance(leaf, torch.Tensor) else leaf, nest
    )


# -- the tests -------------------------------------------------------------------------------


def run_machine(machine: type[Machine], num_examples: int, num_rules: int = 25) -> None:
    """Run the machine; a mutant need not be shrunk, it only has to be found."""
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=num_examples,
            stateful_step_count=num_rules,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            print_blob=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.fault
def test_every_step_is_what_the_rules_say() -> None:
    run_machine(Machine, num_examples=50)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_is_what_the_rules_say_in_many_more_runs() -> None:
    run_machine(Machine, num_examples=2000, num_rules=40)


# -- mutants: what each rule guards against, planted in the engine itself --------------------


def scale_falls_on_a_forward_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GuardedEngine._adjust  # noqa: SLF001 - a mutant of this very method

    def adjust(self: GuardedEngine, label: Any, last: Any) -> None:
        right(self, label, last)
        if last.reading.faults and self._scale is not None:
            self._scale.overflowed()

    monkeypatch.setattr(GuardedEngine, "_adjust", adjust)


def statistics_are_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback.Rollback, "restore_buffers", lambda _: None)


def random_state_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollback.Rollback, "restore_random_state", lambda *_: None)


def proof_is_not_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards.ScaleProof, "overflow_was_bad", lambda *_: None)


def proof_counts_on_after_a_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards.ScaleProof, "scale_rose", lambda _: None)


def growth_is_forgotten_by_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_state_dict(self: Any, state: dict[str, float]) -> None:
        self.value = state["value"]

    monkeypatch.setattr(precision.LossScale, "load_state_dict", load_state_dict)


def scale_has_no_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    right = precision.LossScale.__init__

    def init(self: Any, chosen: EngineSettings) -> None:
        right(self, dataclasses.replace(chosen, max_scale=None))

    monkeypatch.setattr(precision.LossScale, "__init__", init)


def device_never_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    right = signals.Signals.found_nonfinite

    def found_nonfinite(self: Any, *norms: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(right(self, *norms))

    monkeypatch.setattr(signals.Signals, "found_nonfinite", found_nonfinite)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    scale_falls_on_a_forward_fault: "the loss scale is wrong",
    statistics_are_not_put_back: "left a trace|is not finite",
    random_state_is_not_put_back: "the random state is another|drew numbers",
    proof_is_not_withdrawn: "the proven scale is wrong",
    proof_counts_on_after_a_rise: "the proven scale is wrong",
    growth_is_forgotten_by_a_load: "the loss scale is wrong|twin's state is another",
    scale_has_no_upper_bound: "the loss scale is wrong",
    device_never_skips: "left a trace|is not finite|the record of step",
}


class ScaledMachine(Machine):
    """Only fp16, where most of the rules are."""

    settings_of_engine = engine_settings(precisions=("fp16",))


@pytest.mark.fault
@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda mutate: mutate.__name__)
def test_a_mutant_is_caught(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: an engine that breaks one rule does not get through."""
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match=MUTANTS[mutate]):
        run_machine(ScaledMachine, num_examples=30)
