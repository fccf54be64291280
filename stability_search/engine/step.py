"""One optimizer step, taken safely.

step(micro_batches):
    remember buffers and random state
    for each micro-batch: forward under autocast, loss / n * scale, backward
    norm of the gradients; unscale and clip in one pass
    update, skipped on the device if a loss, an output or the norm is not finite
    bring losses, norms and attention signals to the host: one transfer
    if a forward pass was not finite: roll back, go on without that micro-batch (or drop all)
    label the step; adjust the loss scale by where the fault was, never by the label
    end at non-finite parameters or a loss scale below 1
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from stability_search.engine import emulation, guards, optim, precision
from stability_search.engine.checkpointing import checkpoint_blocks
from stability_search.engine.clamps import AttentionGuard, check_attention
from stability_search.engine.clipping import clip_factor
from stability_search.engine.half_weights import widened
from stability_search.engine.judging import Judgement, StepJudge
from stability_search.engine.losses import (
    NUMERICAL_ERRORS,
    LossFn,
    is_out_of_memory,
    mean_terms,
    total_loss,
)
from stability_search.engine.observer import Observer
from stability_search.engine.prepare import prepare_model
from stability_search.engine.reference import DataJudge
from stability_search.engine.resuming import check_state, put_buffers, unsaved_buffers
from stability_search.engine.rollback import notes_on_buffers
from stability_search.engine.trace import trace_forward
from stability_search.engine.window import Attempt, Window, WindowResult
from stability_search.errors import UsageError
from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import Outcome
from stability_search.records.values import finite_or_none
from stability_search.settings.engine import EngineSettings


class GuardedEngine:
    """Train a model step by step without ever raising on a numerical failure.

    Args:
        model: The model, on its device, in the mode (train or eval, per module) you train it in.
            It is changed as the settings say: norms, initial gain, attention, checkpointing.
        settings: How a step is taken.
        reference: Builds the initial model again, in fp32 and without the settings under test;
            asked only when a step is non-finite, to tell bad data from a bad configuration.
            Without it only NaN and Inf in the batch count as bad data.
        parameter_groups: Groups as `torch.optim` takes them, without `lr`; default one group.
        init_gain_names: Parameters that `init_gain` multiplies; default every weight matrix.

    Raises:
        UsageError: The model or the device cannot honour a setting.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> settings = EngineSettings(learning_rate=0.01, clip_norm=1.0)
        >>> with GuardedEngine(model, settings) as engine:
        ...     record = engine.step([torch.ones(4, 3)], lambda m, x: m(x).square().mean())
        >>> record.label.value
        'ok'
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EngineSettings,
        *,
        reference: Callable[[], nn.Module] | None = None,
        parameter_groups: optim.ParameterGroups | None = None,
        init_gain_names: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.device = _device_of(model)
        self.ended: tuple[Outcome, str] | None = None
        precision.check_precision(settings.precision, self.device)
        self._scale = precision.LossScale(settings) if settings.has_loss_scaling else None
        self._proof = guards.ScaleProof()
        self._observer = Observer()
        groups = optim.default_groups(model) if parameter_groups is None else parameter_groups
        groups = optim.checked_groups(groups, model)
        check_attention(model, settings)
        optim.check_schedule(settings)
        # Nothing was changed until here, and what could be refused has been.
        self._notes = (
            *prepare_model(model, settings, init_gain_names=init_gain_names),
            *notes_on_buffers(model),
        )
        self.optimizer = optim.build_optimizer(groups, settings)
        self._num_steps = 0
        self._num_applied = 0
        self._num_bad_steps = 0
        self._num_micro_batches = 0
        with contextlib.ExitStack() as undo:
            self._equip(undo)
            self._undo = undo.pop_all()
        self._data = DataJudge(reference, self.device, self._attention.suspended, self._observer)
        self._judge = StepJudge(model, self._window, self._data, self._proof)
        self._is_open = True

    def _equip(self, undo: contextlib.ExitStack) -> None:
        """Change what `close` changes back."""
        settings = self.settings
        self._attention = AttentionGuard(self.model, settings, self._observer)
        undo.callback(self._attention.detach)
        if settings.gradient_checkpointing:
            undo.callback(checkpoint_blocks(self.model))
        self._window = Window(
            model=self.model,
            settings=settings,
            optimizer=self.optimizer,
            attention=self._attention,
            scale=self._scale,
            device=self.device,
            observer=self._observer,
        )
        undo.callback(self._window.close)
        is_fp16_on_cpu = settings.precision == "fp16" and self.device.type == "cpu"
        self._emulated: Callable[[], contextlib.AbstractContextManager[None]]
        self._emulated = contextlib.nullcontext
        if is_fp16_on_cpu and settings.fp16_on_cpu == "emulated":
            emulation.acquire()
            undo.callback(emulation.release)
            self._emulated = emulation.emulated_fp16

    # -- life ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Use the engine in a `with` block, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def close(self) -> None:
        """Take every hook and kernel away again; the trained parameters stay."""
        self._is_open = False
        self._undo.close()

    @property
    def scale(self) -> float | None:
        """The present loss scale; None without loss scaling."""
        return None if self._scale is None else self._scale.value

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the log should know, one sentence each; may grow while it trains."""
        return (*self._notes, *self._observer.notes)

    @property
    def num_steps(self) -> int:
        """Attempted steps so far, those of a loaded state included."""
        return self._num_steps

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit for bit, model and torch's random state included.

        As in torch, its tensors are the live ones: save it, or copy it, before the next step.
        `torch.load(..., weights_only=True)` reads it back.
        """
        is_cuda = self.device.type == "cuda"
        return {
            "settings": dataclasses.asdict(self.settings),
            "model": self.model.state_dict(),
            "buffers": unsaved_buffers(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scale": None if self._scale is None else self._scale.state_dict(),
            "proof": self._proof.state_dict(),
            "data": self._data.state_dict(),
            "ended": None if self.ended is None else [self.ended[0].value, self.ended[1]],
            "num_steps": self._num_steps,
            "num_applied": self._num_applied,
            "num_micro_batches": self._num_micro_batches,
            "num_bad_steps": self._num_bad_steps,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if is_cuda else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, bit for bit in an engine of equal settings.

        Other settings are those of this engine: a learning rate, a decay or a clip norm may be
        changed on the way.

        Raises:
            ValueError: State and engine do not go together: another optimizer, precision or
                norm, momentum in one alone, or tensors of other names or shapes. Nothing is
                loaded then.
        """
        check_state(state, self.model, self.settings)
        own = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        self.model.load_state_dict(state["model"])
        put_buffers(self.model, state["buffers"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, values in zip(self.optimizer.param_groups, own, strict=True):
            group.update(values)
        if self._scale is not None:
            self._scale.load_state_dict(state["scale"])
        self._proof.load_state_dict(state["proof"])
        self._data.load_state_dict(state["data"])
        ended = state["ended"]
        self.ended = None if ended is None else (Outcome(ended[0]), ended[1])
        self._num_steps = state["num_steps"]
        self._num_applied = state["num_applied"]
        self._num_micro_batches = state["num_micro_batches"]
        self._num_bad_steps = state["num_bad_steps"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    # -- training --------------------------------------------------------------------------

    def step(self, micro_batches: Sequence[Any], loss_fn: LossFn) -> StepRecord:
        """Take one optimizer step over a window of micro-batches.

        Args:
            micro_batches: The window, on the model's device, at least one.
            loss_fn: Called as `loss_fn(model, batch)`; returns a 0-d loss, or a dict of named
                terms that are summed. The engine sets autocast.

        Returns:
            What happened. After a step that set `ended`, training cannot go on.

        Raises:
            ValueError: No micro-batch, a loss that is no 0-d tensor, or a step of an engine that
                is closed or has ended.
            Exception: Whatever `loss_fn` raises that is no numerical failure.
        """
        if not micro_batches:
            raise ValueError("micro_batches: at least one must be given, but got none.")
        self._require_open()
        if self.ended is not None:
            raise ValueError(
                f"step: the engine must not have ended, but it did: {self.ended[0].value} "
                f"({self.ended[1]}). Load a checkpoint, or start anew with other settings."
            )
        started = time.perf_counter()
        self._data.see(micro_batches[0])
        scale = self.scale
        learning_rate = optim.learning_rate_at(self._num_applied, self.settings)
        if learning_rate == 0.0:
            self._observer.say(
                f"The schedule has reached a rate of 0 after num_planned_steps="
                f"{self.settings.num_planned_steps}: nothing more is learned."
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        step = self._num_steps + 1
        with self._attention.acting(), self._emulated():
            result = self._window.take(dict(enumerate(micro_batches)), loss_fn, turn=step)
            judgement = self._judge.judge(micro_batches, loss_fn, result, scale=scale)
        self._adjust(judgement.label, result.last)
        self._num_steps = step
        record = self._record(result, judgement, learning_rate, scale, started)
        self._num_micro_batches += len(micro_batches)
        return record

    def evaluate(self, probe: Sequence[Any], loss_fn: LossFn) -> tuple[float | None, ...]:
        """Measure the loss of each batch in fp32 and eval mode, and leave no trace.

        Args:
            probe: Batches on the model's device, at least one.
            loss_fn: As in `step`.

        Returns:
            A loss per batch; None where it is not finite or could not be computed for numerical
            reasons.
        """
        losses: list[torch.Tensor] = []
        self.measure(lambda _: losses.extend(self._probe_loss(batch, loss_fn) for batch in probe))
        values: list[float] = torch.stack(losses).tolist()
        return tuple(finite_or_none(value) for value in values)

    def measure(self, read: Callable[[nn.Module], object]) -> None:
        """Call `read(model)` in fp32, eval mode and without gradients, and leave no trace.

        Clamp and cap act, since they are part of what was trained; buffers, random state and the
        mode of every module are as before afterwards, and weights stored in half precision, of
        which there is an fp32 copy for that time.
        """
        self._require_open()
        before = self._window.rollback()
        before.mark()
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with (
                torch.no_grad(),
                widened(self.model),
                self._attention.acting(),
                precision.autocast("fp32", self.device),
            ):
                read(self.model)
        finally:
            for module, was_training in modes:
                module.training = was_training
            before.restore_buffers()
            before.restore_random_state()

    def _probe_loss(self, batch: Any, loss_fn: LossFn) -> torch.Tensor:  # noqa: ANN401 - the task's own
        def run() -> torch.Tensor:
            return total_loss(loss_fn(self.model, batch))[0]

        try:
            return run().detach()
        except NUMERICAL_ERRORS:
            pass
        except UsageError:
            raise
        except Exception as error:
            if is_out_of_memory(error) or trace_forward(self.model, run).phase != "forward":
                raise
        return torch.full((), math.nan, device=self.device)

    def _require_open(self) -> None:
        if not self._is_open:
            raise ValueError("engine: it must be open, but it was closed. Make a new one.")

    # -- what became of it ------------------------------------------------------------------

    def _adjust(self, label: StepLabel, last: Attempt) -> None:
        """Move scale and schedule by what happened, and end where nothing can go on."""
        self._num_applied += last.is_applied
        self._num_bad_steps += label is StepLabel.BAD
        limit = self.settings.max_bad_steps
        if limit is not None and self._num_bad_steps >= limit:
            self.ended = (Outcome.PRUNED, "max_bad_steps")
        if last.state_fault:
            self.ended = (Outcome.NONFINITE_PARAMETERS, last.state_fault)
        self._adjust_scale(label, last)

    def _adjust_scale(self, label: StepLabel, last: Attempt) -> None:
        if self._scale is None or last.reading.faults:
            return
        scale = self._scale.value
        if last.is_applied:
            if label is StepLabel.OK:
                self._proof.step_was_ok(scale)
            if self._scale.worked():
                self._proof.scale_rose()
        elif not last.reading.is_grad_finite:
            self._scale.overflowed()
            if label is StepLabel.BAD:
                self._proof.overflow_was_bad(scale)
            if self._scale.value < 1:
                self.ended = (
                    Outcome.SCALE_COLLAPSE,
                    f"the loss scale fell to {self._scale.value:g}, below 1",
                )

    def _record(
        self,
        result: WindowResult,
        judgement: Judgement,
        learning_rate: float,
        scale: float | None,
        started: float,
    ) -> StepRecord:
        first, last = result.first.reading, result.last.reading
        is_complete = len(first.losses) == result.num_micro_batches
        loss = sum(first.losses.values()) / len(first.losses) if is_complete else math.nan
        norm, clip_norm = finite_or_none(last.grad_norm), self.settings.clip_norm
        is_applied = result.last.is_applied
        factor = 1.0 if norm is None or clip_norm is None else clip_factor(norm, clip_norm)
        rms, position = result.last.grad_rms_over_eps, judgement.position
        return StepRecord(
            step=self._num_steps,
            label=judgement.label,
            reason=judgement.reason,
            loss=finite_or_none(loss),
            is_loss_finite=math.isfinite(loss),
            grad_norm=norm,
            is_grad_finite=last.is_grad_finite,
            clipped=is_applied and factor < 1.0,
            is_applied=is_applied,
            learning_rate=learning_rate,
            scale=scale,
            attention_max=finite_or_none(first.attention_max),
            clamp_frac=finite_or_none(last.clamp_frac),
            cap_frac=finite_or_none(last.cap_frac),
            batch_index=None if position is None else self._num_micro_batches + position,
            first_nonfinite_module=judgement.origin.module,
            first_nonfinite_phase=judgement.origin.phase,
            last_finite_max=finite_or_none(judgement.origin.last_finite_max),
            is_transient=judgement.is_transient,
            update_ratio=finite_or_none(last.update_ratio) if is_applied else None,
            zero_grad_frac=finite_or_none(last.zero_grad_frac) if is_applied else None,
            grad_rms_over_eps=finite_or_none(
                None if rms is None else rms * factor / (scale or 1.0)
            ),
            loss_terms=mean_terms(first.terms),
            step_s=time.perf_counter() - started,
        )


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    if first is None:
        raise UsageError("model: it must have a parameter to train, but has none.")
    return first.device
