"""A task that trains in a blink and misbehaves on request; used by file, as a user's would be."""

import ctypes
import faulthandler
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

Batch = tuple[torch.Tensor, torch.Tensor]


class Tiny:
    """Regress a fixed linear map; `behaviour` says what goes wrong, and when it begins.

    `fine`, `raise`, `raise_nan` (an exception caused by a NaN), `kill` (the process dies),
    `hang`, `stop` (SIGSTOP), `nan_batch` (every 10th), `diverge` (a loss that only grows),
    `nan_loss` (in training), `nan_probe` (in eval mode alone), `needs_weights` (no loss where the
    weights are zero), `out_of_memory`, `dirty` (leaves another backend flag behind), `end`
    (batches run out).

    Other ways to hang: `hang_in_c` (holding the interpreter's lock), `hang_deaf` (ignoring
    signals), `hang_loader` (for a data loader whose worker waits for a lock), `hang_unwatched`
    (having disarmed the watchdog), `hang_parent` (of a child, and of one in its own session).
    Other things to leave behind: `leave_thread`, `leave_child`. On the node of Ray that is
    `sick_node` every process dies. A batch takes `batch_s` seconds to load.
    """

    def __init__(
        self,
        behaviour: str = "fine",
        width: int = 16,
        at_step: int = 5,
        sick_node: str = "",
        batch_s: float = 0.0,
    ) -> None:
        print("a word of the task's")
        self.behaviour = behaviour
        self.width = width
        self.at_step = at_step
        self.sick_node = sick_node
        self.batch_s = batch_s
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(8, 1, generator=generator)
        inputs = torch.randn(128, 8, generator=generator)
        self.held_out = [(inputs[i::8], inputs[i::8] @ self.weights) for i in range(8)]
        self.num_fetched = 0

    def model(self) -> nn.Module:
        self.num_fetched = 0
        return nn.Sequential(
            nn.Linear(8, self.width),
            nn.BatchNorm1d(self.width),
            nn.Tanh(),
            nn.Linear(self.width, 1),
        )

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        while True:
            inputs = torch.randn(batch_size, 8, generator=generator)
            targets = inputs @ self.weights
            self.num_fetched += 1
            if self.num_fetched % 10 == 0 and self.behaviour == "nan_batch":
                inputs[0, 0] = math.nan
            if self.num_fetched == self.at_step:
                if self.behaviour == "end":
                    return
                self._misbehave()
            if self.batch_s:
                time.sleep(self.batch_s)
            yield inputs, targets

    def probe(self) -> list[Batch]:
        return self.held_out

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        inputs, targets = batch
        output = model(inputs).float()
        if self.behaviour == "raise_nan" and not bool(torch.isfinite(output).all()):
            raise ValueError("the output is not finite")
        if self.behaviour == "needs_weights" and not bool(output.std()):
            raise ArithmeticError("every output is the same")
        loss = (output - targets).square().mean()
        if self.behaviour == ("nan_loss" if model.training else "nan_probe"):
            return loss * math.nan
        if self.behaviour == "diverge" and model.training:
            return loss + 1e3 * self.num_fetched
        return loss

    def metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        return {"error": float((model(batch[0]) - batch[1]).abs().mean())}

    def _misbehave(self) -> None:
        if self.sick_node and _node_id() == self.sick_node:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "raise":
            raise KeyError("a bug of the user's")
        if self.behaviour == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour.startswith("hang"):
            self._hang()
        if self.behaviour == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.behaviour == "out_of_memory":
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        if self.behaviour == "leave_thread":
            threading.Thread(target=time.sleep, args=[600], name="planted", daemon=True).start()
        if self.behaviour == "leave_child":
            _sleeping_child()
        if self.behaviour == "dirty":
            torch.set_default_dtype(torch.float64)
            torch.set_default_dtype(torch.float32)
            torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark

    def _hang(self) -> None:
        if self.behaviour == "hang_in_c":
            ctypes.PyDLL(None).sleep(600)  # unlike CDLL it keeps the lock
        if self.behaviour == "hang_deaf":
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
                signal.signal(signum, signal.SIG_IGN)
        if self.behaviour == "hang_loader":
            next(iter(DataLoader(_Deadlocked(), num_workers=1)))
        if self.behaviour == "hang_unwatched":
            faulthandler.cancel_dump_traceback_later()
        if self.behaviour == "hang_parent":
            _sleeping_child()
            _sleeping_child(start_new_session=True)
        time.sleep(600)


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def _sleeping_child(*, start_new_session: bool = False) -> None:
    subprocess.Popen(["/bin/sleep", "600"], start_new_session=start_new_session)


class _Deadlocked(Dataset[torch.Tensor]):
    """A data set whose worker waits for a lock that was taken before it was forked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.lock:
            return torch.zeros(index)
