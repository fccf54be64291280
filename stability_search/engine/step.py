"""One optimizer step, taken safely.

step(micro_batches):
    remember buffers and random state
    for each micro-batch: forward under autocast, loss / n * scale, backward
    norm of the gradients; unscale and clip in one pass
    update, skipped on the device if a loss, an output or the norm is not finite
    bring losses, norm, largest parameter and attention signals to the host: one transfer
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

from stability_search.engine import batches, emulation, guards, optim, precision
from stability_search.engine.clamps import AttentionGuard
from stability_search.engine.clipping import rescale_gradients, total_norm
from stability_search.engine.prepare import largest_absolute, prepare_model
from stability_search.engine.rollback import Rollback
from stability_search.engine.signals import Reading, Signals
from stability_search.engine.trace import Origin, trace_forward
from stability_search.errors import UsageError
from stability_search.records import Outcome, StepLabel, StepRecord, finite_or_none
from stability_search.settings import EngineSettings

LossFn = Callable[[nn.Module, Any], "torch.Tensor | Mapping[str, torch.Tensor]"]
_NUMERICAL_ERRORS = (FloatingPointError, torch.linalg.LinAlgError)
_REFERENCE_SEED = 0  # dropout of the reference run is the same each time it is asked


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Attempt:
    reading: Reading
    is_applied: bool


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
        self.device = next(model.parameters()).device
        self.ended: tuple[Outcome, str] | None = None
        precision.check_precision(settings.precision, self.device)
        self._scale = precision.LossScale(settings) if settings.has_loss_scaling else None
        self._proof = guards.ScaleProof()
        self.notes = prepare_model(model, settings, init_gain_names=init_gain_names)
        groups = optim.default_groups(model) if parameter_groups is None else parameter_groups
        self.optimizer = optim.build_optimizer(groups, settings)
        self._trainable = [p for g in self.optimizer.param_groups for p in g["params"]]
        self._attention = AttentionGuard(model, settings)
        self._rollback = Rollback(model, self.device)
        self._reference = reference
        self._reference_model: nn.Module | None = None
        self._inspector: batches.BatchInspector | None = None
        self._output_maxima: list[torch.Tensor] = []
        self._is_watching_output = False
        self._output_hook = model.register_forward_hook(self._watch_output)
        self._num_steps = 0
        self._num_applied = 0
        self._num_micro_batches = 0
        self._is_emulating = (
            settings.precision == "fp16"
            and settings.fp16_on_cpu == "emulated"
            and self.device.type == "cpu"
        )
        if self._is_emulating:
            emulation.acquire()
        self._is_open = True

    # -- life ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Use the engine in a `with` block, which closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()

    def close(self) -> None:
        """Take every hook and kernel away again; the trained parameters stay."""
        if not self._is_open:
            return
        self._is_open = False
        self._output_hook.remove()
        self._attention.detach()
        if self._is_emulating:
            emulation.release()

    @property
    def scale(self) -> float | None:
        """The present loss scale; None without loss scaling."""
        return None if self._scale is None else self._scale.value

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on bit for bit, the model included."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scale": None if self._scale is None else self._scale.state_dict(),
            "proof": self._proof.state_dict(),
            "num_steps": self._num_steps,
            "num_applied": self._num_applied,
            "num_micro_batches": self._num_micro_batches,
            "random": torch.get_rng_state(),
            "random_cuda": (
                torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
            ),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, with equal settings."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scale is not None:
            self._scale.load_state_dict(state["scale"])
        self._proof.load_state_dict(state["proof"])
        self._num_steps = state["num_steps"]
        self._num_applied = state["num_applied"]
        self._num_micro_batches = state["num_micro_batches"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
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
            ValueError: No micro-batch, or a loss that is no 0-d tensor.
            Exception: Whatever `loss_fn` raises that is no numerical failure.
        """
        if not micro_batches:
            raise ValueError("micro_batches: at least one must be given, but got none.")
        started = time.perf_counter()
        if self._inspector is None:
            self._inspector = batches.BatchInspector(micro_batches[0])
        scale = self.scale
        learning_rate = optim.learning_rate_at(self._num_applied, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self._num_steps += 1
        self._rollback.mark()
        with self._context():
            first, last, faults = self._take_window(dict(enumerate(micro_batches)), loss_fn)
            record = self._judge(micro_batches, loss_fn, first, last, faults, scale)
        self._num_micro_batches += len(micro_batches)
        return dataclasses.replace(
            record, learning_rate=learning_rate, step_s=time.perf_counter() - started
        )

    def evaluate(self, probe: Sequence[Any], loss_fn: LossFn) -> tuple[float | None, ...]:
        """Measure the loss of each batch in fp32 and eval mode, and leave no trace.

        Args:
            probe: Batches on the model's device.
            loss_fn: As in `step`.

        Returns:
            A loss per batch; None where it is not finite or could not be computed for numerical
            reasons.
        """
        losses: list[torch.Tensor] = []
        self.measure(
            lambda _: losses.extend(self._probe_loss(batch, loss_fn) for batch in probe)
        )
        values: list[float] = torch.stack(losses).tolist()
        return tuple(finite_or_none(value) for value in values)

    def measure(self, read: Callable[[nn.Module], object]) -> None:
        """Call `read(model)` in fp32, eval mode and without gradients, and leave no trace.

        Clamp and cap act, since they are part of what was trained; random state and the mode of
        every module are as before afterwards.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.eval()
        try:
            with (
                torch.random.fork_rng(devices),
                torch.no_grad(),
                self._attention.acting(),
                precision.autocast("fp32", self.device),
            ):
                read(self.model)
        finally:
            for module, was_training in modes:
                module.training = was_training

    def _probe_loss(self, batch: Any, loss_fn: LossFn) -> torch.Tensor:  # noqa: ANN401
        try:
            loss, _ = _total_loss(loss_fn(self.model, batch))
        except _NUMERICAL_ERRORS:
            return torch.full((), math.nan, device=self.device)
        return loss.detach().float()

    # -- one window ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _context(self) -> Any:  # noqa: ANN401 - a context manager of three
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._attention.acting())
            if self._is_emulating:
                stack.enter_context(emulation.emulated_fp16())
            yield

    def _take_window(
        self, window: dict[int, Any], loss_fn: LossFn
    ) -> tuple[_Attempt, _Attempt, dict[int, str]]:
        """Attempt the window, again without the micro-batches whose forward pass broke."""
        faults: dict[int, str] = {}
        first = last = self._attempt(window, loss_fn)
        while last.reading.faults:
            faults |= last.reading.faults
            self._rollback.restore_buffers()
            left = {k: v for k, v in window.items() if k not in faults}
            if self.settings.bad_microbatch == "drop" or not left:
                break
            self._rollback.restore_random_state()
            last = self._attempt(left, loss_fn)
        if not last.is_applied:
            self._rollback.restore_buffers()
        return first, last, faults

    def _attempt(self, window: Mapping[int, Any], loss_fn: LossFn) -> _Attempt:
        signals = Signals()
        self.optimizer.zero_grad(set_to_none=True)
        for position, batch in window.items():
            self._forward_backward(position, batch, loss_fn, signals, len(window))
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        if signals.has_exception or not gradients:
            reading = signals.read(None, largest_absolute(self._trainable))
            return _Attempt(reading=reading, is_applied=False)
        inverse_scale = 1.0 if self._scale is None else 1.0 / self._scale.value
        scaled_norm = total_norm(gradients)
        norm = scaled_norm * inverse_scale
        found_nonfinite = signals.found_nonfinite(scaled_norm)
        rescale_gradients(
            gradients, norm, inverse_scale=inverse_scale, clip_norm=self.settings.clip_norm
        )
        self._update(found_nonfinite)
        reading = signals.read(norm, largest_absolute(self._trainable))
        is_applied = not reading.faults and reading.is_grad_finite
        return _Attempt(reading=reading, is_applied=is_applied)

    def _update(self, found_nonfinite: torch.Tensor) -> None:
        if self.optimizer.defaults["fused"]:
            # The protocol by which torch.amp.GradScaler lets a fused optimizer skip itself.
            self.optimizer.found_inf = found_nonfinite  # type: ignore[attr-defined]
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not bool(found_nonfinite):
            self.optimizer.step()

    def _forward_backward(
        self,
        position: int,
        batch: Any,  # noqa: ANN401 - the task's own
        loss_fn: LossFn,
        signals: Signals,
        num_micro_batches: int,
    ) -> None:
        self._attention.clear()
        self._output_maxima.clear()
        try:
            with self._attention.recording():
                loss, terms = self._loss(batch, loss_fn)
        except _NUMERICAL_ERRORS as error:
            signals.add_exception(position, error)
            return
        except Exception as error:
            if is_out_of_memory(error) or not self._broke_first(batch, loss_fn):
                raise
            signals.add_exception(position, error)
            return
        signals.add_loss(position, loss, terms)
        signals.add_maxima(position, "output", self._output_maxima)
        signals.add_maxima(position, "attention output", self._attention.output_maxima)
        signals.add_maxima(position, "attention_max", self._attention.logit_maxima)
        signals.add_fracs("clamp_frac", self._attention.clamp_fracs)
        signals.add_fracs("cap_frac", self._attention.cap_fracs)
        share = loss.float() / num_micro_batches
        (share if self._scale is None else share * self._scale.value).backward()  # type: ignore[no-untyped-call]
        if self._num_steps == 1 and self.settings.attention_logit_cap is not None:
            self._check_cap_acted()

    def _loss(
        self,
        batch: Any,  # noqa: ANN401 - the task's own
        loss_fn: LossFn,
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        self._is_watching_output = True
        try:
            with precision.autocast(self.settings.precision, self.device):
                return _total_loss(loss_fn(self.model, batch))
        finally:
            self._is_watching_output = False

    def _watch_output(self, _module: nn.Module, _args: object, output: object) -> None:
        if self._is_watching_output:
            self._output_maxima.extend(
                tensor.detach().amax().float()
                for _, tensor in batches.tensors(output)
                if tensor.is_floating_point() and tensor.numel()
            )

    def _check_cap_acted(self) -> None:
        if self._attention.num_capped_calls == 0:
            raise UsageError(
                "attention_logit_cap: no attention of the model went through "
                "nn.MultiheadAttention, scaled_dot_product_attention or cap_logits.",
                hint="Call stability_search.cap_logits on its logits, or leave the cap out.",
            )

    # -- judgement -------------------------------------------------------------------------

    def _judge(  # noqa: PLR0913 - all there is to know about a window
        self,
        micro_batches: Sequence[Any],
        loss_fn: LossFn,
        first: _Attempt,
        last: _Attempt,
        faults: Mapping[int, str],
        scale: float | None,
    ) -> StepRecord:
        facts = guards.StepFacts(
            are_parameters_finite=last.reading.are_parameters_finite,
            batch_fault="",
            forward_fault=faults[min(faults)] if faults else "",
            is_grad_finite=bool(faults) or last.reading.is_grad_finite,
            scale=scale,
            proven_scale=self._proof.proven_scale,
        )
        position = min(faults) if faults else None
        origin = Origin(module=None, phase=None)
        if not facts.is_finite:
            data_position, batch_fault = self._batch_fault(micro_batches, loss_fn)
            facts = dataclasses.replace(facts, batch_fault=batch_fault)
            position = position if data_position is None else data_position
            if faults:
                origin = self._trace(micro_batches[min(faults)], loss_fn)
            elif not facts.is_grad_finite:
                origin = Origin(module=None, phase="backward")
        label, reason = guards.label_step(facts)
        self._adjust(label, last, is_forward_broken=bool(last.reading.faults))
        return self._record(label, reason, first, last, scale, position, origin)

    def _adjust(self, label: StepLabel, last: _Attempt, *, is_forward_broken: bool) -> None:
        """Move scale and schedule by what happened, and end where nothing can go on."""
        if last.is_applied:
            self._num_applied += 1
        if not last.reading.are_parameters_finite:
            self.ended = (Outcome.NONFINITE_PARAMETERS, "a parameter became NaN or Inf")
        if self._scale is None or is_forward_broken:
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
            if self._scale.value < 1 and self.ended is None:
                self.ended = (
                    Outcome.SCALE_COLLAPSE,
                    f"the loss scale fell to {self._scale.value:g}, below 1",
                )

    def _record(  # noqa: PLR0913 - the fields of a record
        self,
        label: StepLabel,
        reason: str,
        first: _Attempt,
        last: _Attempt,
        scale: float | None,
        position: int | None,
        origin: Origin,
    ) -> StepRecord:
        reading = last.reading
        losses = first.reading.losses
        is_complete = len(losses) > 0 and not first.reading.has_exception
        loss = sum(losses.values()) / len(losses) if is_complete else math.nan
        clip_norm = math.inf if self.settings.clip_norm is None else self.settings.clip_norm
        norm = finite_or_none(reading.grad_norm)
        return StepRecord(
            step=self._num_steps,
            label=label,
            reason=reason,
            loss=finite_or_none(loss),
            is_loss_finite=math.isfinite(loss),
            grad_norm=norm,
            is_grad_finite=reading.is_grad_finite,
            clipped=last.is_applied and norm is not None and norm > clip_norm,
            is_applied=last.is_applied,
            learning_rate=0.0,
            scale=scale,
            attention_max=finite_or_none(first.reading.attention_max),
            clamp_frac=finite_or_none(reading.clamp_frac),
            cap_frac=finite_or_none(reading.cap_frac),
            batch_index=None if position is None else self._num_micro_batches + position,
            first_nonfinite_module=origin.module,
            first_nonfinite_phase=origin.phase,
            loss_terms=_mean_terms(first.reading.terms),
        )

    # -- questions asked only of a non-finite step -------------------------------------------

    def _batch_fault(
        self, micro_batches: Sequence[Any], loss_fn: LossFn
    ) -> tuple[int | None, str]:
        inspector = self._inspector
        assert inspector is not None  # noqa: S101 - made before the first window
        for position, batch in enumerate(micro_batches):
            fault = inspector.fault(batch)
            if not fault and self._reference is not None:
                fault = self._reference_fault(batch, loss_fn)
            if fault:
                return position, fault
        return None, ""

    def _reference_fault(self, batch: Any, loss_fn: LossFn) -> str:  # noqa: ANN401
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._attention.suspended():
            if self._reference_model is None and self._reference is not None:
                self._reference_model = self._reference()
            assert self._reference_model is not None  # noqa: S101 - the caller checked
            torch.manual_seed(_REFERENCE_SEED)
            try:
                with torch.no_grad(), precision.autocast("fp32", self.device):
                    loss, _ = _total_loss(loss_fn(self._reference_model, batch))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                return f"the initial fp32 model fails on it too ({type(error).__name__})"
        if bool(torch.isfinite(loss)):
            return ""
        return "the initial fp32 model gives a non-finite loss on it too"

    def _trace(self, batch: Any, loss_fn: LossFn) -> Origin:  # noqa: ANN401 - the task's own
        """Repeat a micro-batch under hooks, and leave no trace of having done so."""
        after = Rollback(self.model, self.device)
        after.mark()
        self._rollback.restore_buffers()
        self._rollback.restore_random_state()

        def run() -> torch.Tensor:
            with precision.autocast(self.settings.precision, self.device):
                return _total_loss(loss_fn(self.model, batch))[0]

        try:
            return trace_forward(self.model, run)
        finally:
            after.restore_buffers()
            after.restore_random_state()

    def _broke_first(self, batch: Any, loss_fn: LossFn) -> bool:  # noqa: ANN401 - as above
        return self._trace(batch, loss_fn).phase == "forward"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for every way torch says that memory ran out, the CPU's included."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _total_loss(
    result: "torch.Tensor | Mapping[str, torch.Tensor]",
) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    terms = result if isinstance(result, Mapping) else {"loss": result}
    for value in terms.values():
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            got = (
                f"shape {tuple(value.shape)}"
                if isinstance(value, torch.Tensor)
                else type(value).__name__
            )
            raise ValueError(f"loss: it must be a 0-d tensor or a dict of them, but got {got}.")
    if not isinstance(result, Mapping):
        return result.reshape(()).float(), {}
    return torch.stack([term.reshape(()).float() for term in terms.values()]).sum(), terms


def _mean_terms(terms: Mapping[int, Mapping[str, float]]) -> dict[str, float | None]:
    names = {name: None for row in terms.values() for name in row}
    return {
        name: finite_or_none(sum(row.get(name, 0.0) for row in terms.values()) / len(terms))
        for name in names
    }
