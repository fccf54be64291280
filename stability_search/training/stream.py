"""The data of a long training, and how it is put back where it was."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from stability_search.assembly import training_stream
from stability_search.engine.batches import tensors
from stability_search.tasks.base import Task


class DataStream:
    """Draw windows of micro-batches and know how many were drawn.

    The state of a generator does not put back an arbitrary task (a shuffled list, a worker's
    queue), so a stream is put back by drawing from its beginning.

    Args:
        task: What is trained.
        batch_size: Samples of a micro-batch, >= 1.
        seed: Decides what is drawn.
        device: Where the micro-batches go.
    """

    def __init__(self, task: Task, *, batch_size: int, seed: int, device: torch.device) -> None:
        """Begin the stream; the global random states are set."""
        self.seed = seed
        self.batch_size = batch_size
        self._stream = training_stream(task, batch_size=batch_size, seed=seed, device=device)
        self._last: Any = None
        self.num_drawn = 0

    def window(self, size: int) -> list[Any]:
        """Return the next so many micro-batches."""
        drawn = [self._next() for _ in range(size)]
        self._last = drawn[-1]
        return drawn

    def skip(self, count: int) -> None:
        """Leave out the next so many micro-batches."""
        for _ in range(count):
            self._last = self._next()

    def _next(self) -> Any:  # noqa: ANN401 - a batch is the task's own
        batch = next(self._stream)
        self.num_drawn += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is, for `put_back`."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_drawn": self.num_drawn,
            "last_sha256": _sha256(self._last),
        }

    def put_back(self, state: Mapping[str, Any], check: Callable[[], None]) -> bool:
        """Draw a fresh stream up to where another one was.

        Args:
            state: What `state_dict` of the other one returned.
            check: Called before each micro-batch; may raise.

        Returns:
            True if the last micro-batch is the same one, bit for bit.
        """
        while self.num_drawn < state["num_drawn"]:
            check()
            self._last = self._next()
        return bool(_sha256(self._last) == state["last_sha256"])


def _sha256(batch: Any) -> str:  # noqa: ANN401 - a batch is the task's own
    digest = hashlib.sha256()
    for path, tensor in tensors(batch):
        digest.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous()
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
