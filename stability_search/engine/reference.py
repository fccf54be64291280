"""Whether a batch is at fault: asked only of a non-finite step, of each of its micro-batches."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stability_search.engine import precision
from stability_search.engine.batches import BatchInspector
from stability_search.engine.half_weights import keep_no_half_precision
from stability_search.engine.losses import (
    NUMERICAL_ERRORS,
    LossFn,
    is_out_of_memory,
    total_loss,
)
from stability_search.engine.observer import Observer
from stability_search.engine.rollback import Rollback
from stability_search.engine.signals import spell_error
from stability_search.engine.trace import trace_forward

_SEED = 0  # dropout of the reference run is the same each time it is asked


class DataJudge:
    """Tell bad data from a bad configuration.

    A batch is at fault if it holds NaN or Inf, or breaks even the *reference*: the initial model
    in fp32 and train mode, without the settings under test.

    Args:
        reference: Builds that model, on the device; None to judge by NaN and Inf alone.
        device: Device of the batches.
        suspended: Takes the settings under test out of reach of another model.
        observer: Told where the reference could not be asked.
    """

    def __init__(
        self,
        reference: Callable[[], nn.Module] | None,
        device: torch.device,
        suspended: Callable[[], contextlib.AbstractContextManager[None]],
        observer: Observer,
    ) -> None:
        self._observer = observer
        self._build = reference
        self._device = device
        self._suspended = suspended
        self._model: nn.Module | None = None
        self._initial: Rollback | None = None
        self._inspector: BatchInspector | None = None

    def see(self, batch: Any) -> None:  # noqa: ANN401 - a batch is the task's own
        """Show it the first micro-batch; later ones are ignored."""
        if self._inspector is None:
            self._inspector = BatchInspector(batch)

    def fault(self, micro_batches: Sequence[Any], loss_fn: LossFn) -> tuple[int | None, str]:
        """Return position and fault of a micro-batch at fault, or None and nothing.

        The first that holds NaN or Inf is named, or the first that breaks the reference.
        """
        inspector = self._inspector
        assert inspector is not None  # noqa: S101 - the engine shows the first batch first
        for position, batch in enumerate(micro_batches):
            if fault := inspector.fault(batch):
                return position, fault
        if self._build is None:
            return None, ""
        for position, batch in enumerate(micro_batches):
            if fault := self._reference_fault(self._build, batch, loss_fn):
                return position, fault
        return None, ""

    def state_dict(self) -> dict[str, bool] | None:
        """Return what `load_state_dict` needs; None before the first batch."""
        return None if self._inspector is None else self._inspector.state_dict()

    def load_state_dict(self, state: Mapping[str, bool] | None) -> None:
        """Go on from what `state_dict` returned."""
        self._inspector = None if state is None else BatchInspector.from_state_dict(state)

    def _reference_fault(
        self,
        build: Callable[[], nn.Module],
        batch: Any,  # noqa: ANN401 - the task's own
        loss_fn: LossFn,
    ) -> str:
        devices = [self._device] if self._device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            self._suspended(),
            precision.autocast("fp32", self._device),
            torch.enable_grad(),  # a loss may take gradients of its own
        ):
            try:
                return self._judge(self._reference(build), batch, loss_fn)
            except Exception as error:  # noqa: BLE001 - what the reference cannot bear is no verdict
                if is_out_of_memory(error):
                    self._model = self._initial = None
                self._observer.note("batch at a bad step", error)
                return ""
            finally:
                if self._initial is not None:
                    self._initial.restore_buffers()

    def _reference(self, build: Callable[[], nn.Module]) -> nn.Module:
        if self._model is None:
            self._model = keep_no_half_precision(build()).to(self._device).train()
            self._initial = Rollback(self._model, self._device)
            self._initial.mark()
        return self._model

    @staticmethod
    def _judge(model: nn.Module, batch: Any, loss_fn: LossFn) -> str:  # noqa: ANN401 - as above
        def run() -> torch.Tensor:
            torch.default_generator.manual_seed(_SEED)
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.manual_seed(_SEED)  # of the device in use, whose state is given back
            return total_loss(loss_fn(model, batch))[0].detach()

        try:
            if bool(torch.isfinite(run())):
                return ""
        except NUMERICAL_ERRORS as error:
            return f"the initial fp32 model fails on it too ({spell_error(error)})"
        except Exception as error:
            if is_out_of_memory(error) or trace_forward(model, run).phase != "forward":
                raise
            return f"the initial fp32 model fails on it too ({spell_error(error)})"
        return "the initial fp32 model gives a non-finite loss on it too"
