"""The loops of PyTorch Lightning and of the Hugging Face Trainer, a step after a plain one.

Both get the model, the windows, the fused AdamW and the clipping of the plain step, and take
micro-batches from a list, which costs less than a data loader. Loggers, progress bars and
checkpoints are off. A callback at the start of every optimizer step stops the clock, takes a plain
step and starts the clock again: start-up is left out, and both kinds of step take turns.
"""

import contextlib
import gc
import importlib.util
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tests.benchmarks.bench_cases import (
    CLIP_NORM,
    DTYPES,
    Batch,
    Case,
    Step,
    Window,
    fused_adamw,
    plain_step,
    seed_dropout,
)
from tests.benchmarks.bench_ratios import Pairs, Seconds, clock, since

WARM_UP = 10
LIGHTNING_NAMES = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Batches:
    """The cheapest loader: batches one after the other, in order.

    Args:
        listed: The batches.
    """

    def __init__(self, listed: Sequence[Batch]) -> None:
        self._listed = listed

    def __len__(self) -> int:
        return len(self._listed)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._listed)


class CannotRunError(Exception):
    """Why a loop cannot be measured here."""


@dataclass(kw_only=True, slots=True)
class Turns:
    """Take a plain step between two steps of a loop, and keep the seconds of both.

    Attributes:
        step: The plain step.
        windows: Its windows, those of the loop.
        plain_s: Seconds of the plain steps.
        loop_s: Seconds between two plain steps: a step of the loop.
    """

    step: Step
    windows: Sequence[Window]
    plain_s: list[Seconds] = field(default_factory=list)
    loop_s: list[Seconds] = field(default_factory=list)
    number: int = 0
    started: Seconds = (0.0, 0.0)

    def at_step_start(self) -> None:
        """Be called by the loop before it begins an optimizer step."""
        loop_s = since(self.started)
        if self.number:
            self.loop_s.append(loop_s)
        seed_dropout(self.number)
        self.started = clock()
        self.step(self.windows[self.number])
        self.plain_s.append(since(self.started))
        seed_dropout(self.number)
        self.number += 1
        self.started = clock()


Loop = Callable[[Case, str, Turns, str], None]


def measure(loop: Loop, case: Case, precision: str, num_rounds: int, num_steps: int) -> Pairs:
    """Return the seconds of plain steps and of the loop's.

    Raises:
        CannotRunError: It is not installed, or has not this precision on a CPU.
    """
    pairs = Pairs()
    for _ in range(num_rounds):
        # The last step has no successor that would stop the clock.
        windows = list(itertools.islice(case.windows(), WARM_UP + num_steps + 1))
        turns = Turns(step=plain_step(case, precision), windows=windows)
        gc.collect()
        with tempfile.TemporaryDirectory() as folder, quiet():
            loop(case, precision, turns, folder)
        if turns.number != len(windows):
            raise CannotRunError(f"it took {turns.number} steps instead of {len(windows)}")
        pairs.add(turns.plain_s[WARM_UP:-1], turns.loop_s[WARM_UP:])
    return pairs


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the libraries say about their own settings; leave nothing of them behind."""
    before = torch.get_rng_state()
    names = ("lightning.pytorch.utilities.rank_zero", "transformers", "accelerate")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        torch.set_rng_state(before)


def checked(model: nn.Module, precision: str) -> nn.Module:
    """Let the model raise if its first linear layer does not compute in the precision.

    A loop may take another one where it cannot honour it, and say so only in a warning.
    """

    def check(_module: nn.Module, _args: object, output: torch.Tensor) -> None:
        for hook in hooks:
            hook.remove()
        if output.dtype != DTYPES[precision]:
            raise CannotRunError(f"asked for {precision}, it computes in {str(output.dtype)[6:]}")

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(check) for layer in layers]
    return model


def _require(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise CannotRunError(f"{module} is not installed; the extra `bench` has it")


def lightning_loop(case: Case, precision: str, turns: Turns, folder: str) -> None:
    """Train with lightning.pytorch.Trainer."""
    _require("lightning")
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = checked(case.build(), precision)

        def training_step(self, batch: Batch, _: int) -> torch.Tensor:
            return case.loss_fn(self.model, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fused_adamw(self.model)

        def transfer_batch_to_device(self, batch: Batch, *_: object, **__: object) -> Batch:
            return batch  # it is there; Lightning cannot move a frozen dataclass

        def configure_gradient_clipping(
            self,
            optimizer: torch.optim.Optimizer,  # noqa: ARG002 - Lightning's own signature
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,  # noqa: ARG002 - as above
        ) -> None:
            # What Lightning does by itself, except that it refuses a fused optimizer in bf16.
            nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val or CLIP_NORM)

    class Callback(lightning.Callback):
        def on_train_batch_start(
            self, _trainer: object, _module: object, _batch: object, batch_idx: int
        ) -> None:
            if batch_idx % case.accumulation == 0:
                turns.at_step_start()

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision=LIGHTNING_NAMES[precision],  # type: ignore[arg-type]
        max_steps=len(turns.windows),
        max_epochs=1,
        accumulate_grad_batches=case.accumulation,
        gradient_clip_val=CLIP_NORM,
        callbacks=[Callback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    batches = Batches([batch for window in turns.windows for batch in window])
    trainer.fit(Module(), batches)


class _Loss(nn.Module):
    """A model as the Hugging Face Trainer wants it: it returns its loss."""

    def __init__(self, case: Case, precision: str) -> None:
        super().__init__()
        self.model = checked(case.build(), precision)
        self._loss_fn = case.loss_fn

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": self._loss_fn(self.model, batch)}


def huggingface_loop(case: Case, precision: str, turns: Turns, folder: str) -> None:
    """Train with transformers.Trainer."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    _require("transformers", "accelerate")
    import transformers

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            turns.at_step_start()

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> Batches:
            return Batches([{"batch": batch} for window in turns.windows for batch in window])

    model = _Loss(case, precision)
    optimizer = fused_adamw(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            max_steps=len(turns.windows),
            gradient_accumulation_steps=case.accumulation,
            max_grad_norm=CLIP_NORM,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[Callback()],
        optimizers=(optimizer, schedule),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


LOOPS: dict[str, Loop] = {"lightning": lightning_loop, "hf trainer": huggingface_loop}
