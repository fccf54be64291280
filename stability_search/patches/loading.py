"""Data loaders: which batch a step was fed, and when an epoch ends.

PyTorch has no hook there, so `DataLoader.__iter__` and `__next__` of its iterators are wrapped.
"""

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, dataloader

from stability_search.engine.batches import BatchInspector
from stability_search.patches.messages import Messages
from stability_search.patches.replacing import Replacements

_MOST_HELD = 8  # batches of a window that are kept until its step is judged
_LEAST_BATCHES = 2  # a loader that is started anew for every batch has no epochs


@dataclass(kw_only=True, slots=True)
class _Pass:
    """One pass of a loader over its data.

    Attributes:
        loader: Weak reference to it.
        length: Batches of a pass; None for a stream without a known end.
        num_batches: Batches handed out so far.
    """

    loader: Callable[[], object]
    length: int | None
    num_batches: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _HeldBatch:
    """A batch that was handed out.

    Attributes:
        batch: The batch itself.
        index: Its place in its pass, from 0.
        origin: The pass.
    """

    batch: object
    index: int
    origin: _Pass


class Data:
    """Batches since the last step, and the pass that training is in.

    Attributes:
        has_to_end_epoch: True lets that pass end where its next batch would come.
    """

    def __init__(self) -> None:
        self.has_to_end_epoch = False
        self._held: deque[_HeldBatch] = deque(maxlen=_MOST_HELD)
        self._inspector: BatchInspector | None = None
        self._passes: weakref.WeakKeyDictionary[Any, _Pass] = weakref.WeakKeyDictionary()
        self._training: _Pass | None = None

    def starts_epoch(self, loader: DataLoader[Any]) -> bool:
        """Return True if this loader, about to start again, ends an epoch of training by that."""
        training = self._training
        if training is None or training.num_batches < _LEAST_BATCHES:
            return False
        return training.loader() is loader

    def started(self, loader: DataLoader[Any], iterator: Iterator[Any]) -> None:
        """Note that a loader has started a pass."""
        try:
            length = len(loader)
        except TypeError:  # a stream
            length = None
        self._passes[iterator] = _Pass(loader=weakref.ref(loader), length=length)

    def is_over(self, iterator: Iterator[Any]) -> bool:
        """Return True, once, if this pass was asked to end."""
        if not self.has_to_end_epoch or self._passes.get(iterator) is not self._training:
            return False
        self.has_to_end_epoch = False
        return True

    def handed_out(self, iterator: Iterator[Any], batch: object) -> bool:
        """Note a batch.

        Returns:
            True if it may be trained on: gradients are on.
        """
        origin = self._passes.get(iterator)
        if origin is None:  # it started before the patches
            origin = self._passes[iterator] = _Pass(loader=lambda: None, length=None)
        index = origin.num_batches
        origin.num_batches += 1
        if not torch.is_grad_enabled():
            return False
        if self._inspector is None:
            self._inspector = BatchInspector(batch)
        self._held.append(_HeldBatch(batch=batch, index=index, origin=origin))
        return True

    def fault(self) -> tuple[str, int | None]:
        """Return what is wrong with a batch since the last step, and its index.

        Returns:
            An empty fault if nothing is; the index is then that of the last batch handed out, or
            None where no loader was seen.
        """
        for held in self._held:
            fault = "" if self._inspector is None else self._inspector.fault(held.batch)
            if fault:
                self._held.remove(held)  # it is to blame for one step
                self._training = held.origin
                return fault, held.index
        return "", self._held[-1].index if self._held else None

    def step_was_taken(self) -> int | None:
        """Let go of the batches; return how many the pass holds, where that is known.

        The last one stays for another step: a loop that reads ahead has not trained on it yet.
        """
        if self._held:
            self._training = self._held[-1].origin
            self._held = deque([self._held[-1]], maxlen=_MOST_HELD)
        return None if self._training is None else self._training.length


def patch_loaders(
    data: Data,
    messages: Messages,
    replacements: Replacements,
    *,
    on_epoch: Callable[[], None],
    on_batch: Callable[[], None],
) -> None:
    """Let loaders tell `data` of their batches.

    Args:
        data: Hears of every batch.
        messages: Where a failure is said.
        replacements: Where the names go.
        on_epoch: Called when training starts the next pass over its data.
        on_batch: Called before a batch that may be trained on.
    """
    start = DataLoader.__iter__
    advance = dataloader._BaseDataLoaderIter.__next__  # noqa: SLF001 - where batches come from

    @functools.wraps(start)
    def started(loader: DataLoader[Any]) -> Iterator[Any]:
        with messages.survives("epochs of the data loader"):
            if data.starts_epoch(loader):
                on_epoch()
        iterator: Iterator[Any] = start(loader)
        with messages.survives("epochs of the data loader"):
            data.started(loader, iterator)
        return iterator

    @functools.wraps(advance)
    def advanced(iterator: Any) -> Any:  # noqa: ANN401 - a batch is the script's own
        is_over = False
        with messages.survives("end of an epoch"):
            is_over = data.is_over(iterator)
        if is_over:
            raise StopIteration
        batch = advance(iterator)
        with messages.survives("batches of the data loader"):
            if data.handed_out(iterator, batch):
                on_batch()
        return batch

    replacements.put(DataLoader, "__iter__", started)
    replacements.put(dataloader._BaseDataLoaderIter, "__next__", advanced)  # noqa: SLF001 - as above
