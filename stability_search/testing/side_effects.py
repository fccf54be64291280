"""What a task keeps of a trial, shares or changes, though each of its methods looks sound."""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from stability_search.engine import batches
from stability_search.engine.losses import total_loss
from stability_search.engine.rollback import Rollback
from stability_search.settings.engine import EngineSettings
from stability_search.tasks.base import Batch, HasBaseline, Task
from stability_search.testing.fingerprint import fingerprint, other_random_state, seed_everything
from stability_search.testing.rehearsal import rehearse

_CPU = torch.device("cpu")
_REL_TOL = 1e-4  # above what the order of a sum can do on several threads

_Span = tuple[int, int]  # first address, and the one behind the last


def find_side_effects(
    task: Task, *, batch_size: int, num_batches: int, seed: int
) -> Iterator[str]:
    """Say what a task, sound method by method, keeps, shares or changes; see `check_task`.

    Args:
        task: A task whose required methods are sound.
        batch_size: Samples of a training batch, >= 1.
        num_batches: Training batches looked at, and steps of each trial, >= 1.
        seed: Seed of streams and trials, >= 0.

    Yields:
        One sentence per finding.
    """
    found = [
        *_check_model_is_new(task),
        *_check_batches(task, batch_size, num_batches, seed),
        *_check_loss(task, batch_size, seed),
    ]
    yield from found
    if not found:
        yield from _check_trials(task, batch_size, num_batches, seed)


def _check_batches(task: Task, batch_size: int, num_batches: int, seed: int) -> Iterator[str]:
    stream = task.batches(batch_size, torch.Generator().manual_seed(seed))
    drawn: list[Batch] = []
    prints: list[bytes] = []
    for batch in itertools.islice(stream, num_batches):
        drawn.append(batch)
        prints.append(fingerprint(batch))
    if [fingerprint(batch) for batch in drawn] != prints:
        yield (
            "`batches` changes a batch after it was yielded, but a window holds several at once; "
            "yield new tensors each time."
        )
    if _share_memory(drawn, task.probe()):
        yield (
            "`batches` yields memory of `probe`: the probe must hold samples that are not "
            "trained on."
        )


def _check_model_is_new(task: Task) -> Iterator[str]:
    first, second = task.model(), task.model()
    known = {p.data_ptr() for p in first.parameters() if p.requires_grad and p.numel()}
    for name, parameter in second.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() in known:
            yield (
                f"`model` hands out the parameter `{name}` a second time, so that a trial goes on "
                "where the last one stopped; build a new model at every call."
            )
            return


def _share_memory(drawn: Sequence[Batch], probe: Sequence[Batch]) -> bool:
    spans = [_spans(batch) for batch in drawn]
    constant = set.intersection(*spans)  # a mask, say, that is part of every batch
    trained = set.union(*spans) - constant
    held_out = set.union(*[_spans(batch) for batch in probe])
    return any(a[0] < b[1] and b[0] < a[1] for a in trained for b in held_out)


def _spans(batch: Batch) -> set[_Span]:
    """Return where the dense tensors are; of one that is not contiguous, where it begins."""
    return {
        (start, start + (tensor.nbytes if tensor.is_contiguous() else 1))
        for _, tensor in batches.tensors(batch)
        if tensor.layout == torch.strided and tensor.numel() and (start := tensor.data_ptr())
    }


def _check_loss(task: Task, batch_size: int, seed: int) -> Iterator[str]:
    """Compute a loss twice, as the engine does that repeats a micro-batch."""
    seed_everything(seed)
    model = task.model().train()
    batch = next(iter(task.batches(batch_size, torch.Generator().manual_seed(seed))))
    modes = [module.training for module in model.modules()]
    before = Rollback(model, _CPU)
    before.mark()
    inputs, others = fingerprint(batch), other_random_state()
    first = total_loss(task.loss(model, batch))[0].item()
    if [module.training for module in model.modules()] != modes:
        yield "`loss` switches modules between train and eval mode; leave the mode to the engine."
        model.train()
    if other_random_state() != others:
        yield (
            "`loss` draws from numpy's or Python's global random state; draw from torch's, which "
            "is put back where a micro-batch is repeated."
        )
        return
    if fingerprint(batch) != inputs:
        yield "`loss` changes its batch in place; a repeated micro-batch must be the same one."
        return
    before.restore_buffers()
    before.restore_random_state()
    again = total_loss(task.loss(model, batch))[0].item()
    if not _are_same(first, again):
        yield (
            f"`loss` gives {again:g} after {first:g} on the same weights, batch and random state; "
            "keep nothing between two calls."
        )


def _check_trials(task: Task, batch_size: int, num_steps: int, seed: int) -> Iterator[str]:
    """Train twice on the same task object, and ask for the fixed things once more."""
    probe = fingerprint(list(task.probe()))
    baseline = task.baseline() if isinstance(task, HasBaseline) else None
    settings = EngineSettings(learning_rate=1e-3)
    first, second = (
        rehearse(task, settings, num_steps=num_steps, batch_size=batch_size, seed=seed)
        for _ in range(2)
    )
    for one, other in zip(first.records, second.records, strict=False):
        if not _are_same(one.loss, other.loss):
            yield (
                f"A second trial of equal seed has the loss {other.loss} at step {one.step} "
                f"instead of {one.loss}: the task keeps something of the first one."
            )
            break
    if fingerprint(list(task.probe())) != probe:
        yield "`probe` returns other batches after training; nothing may write into them."
    if isinstance(task, HasBaseline) and task.baseline() != baseline:
        yield "`baseline` returns another number after training."


def _are_same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or math.isclose(one, other, rel_tol=_REL_TOL)
