"""Checks that anyone can run on a task of their own before a search trusts it.

    def test_my_task() -> None:
        assert check_task(MyTask(hidden=64)) == ()

What is wrong comes back as plain sentences. What a task raises is not caught: its traceback says
more than we could.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stability_search.assembly import other_random_states_kept
from stability_search.tasks.base import (
    REQUIRED_METHODS,
    Batch,
    HasBaseline,
    HasInitGainParameters,
    HasMetrics,
    HasParameterGroups,
    HasProbeLoss,
    Task,
)
from stability_search.testing.fingerprint import fingerprint, random_state, seed_everything
from stability_search.testing.process_settings import settings_restored
from stability_search.testing.side_effects import find_side_effects

_MIN_PROBE_BATCHES = 4  # fewer, and the noise of the probe cannot be estimated
_OTHER_SEED = 1


def check_task(
    task: Task, *, batch_size: int = 2, num_batches: int = 3, seed: int = 0
) -> tuple[str, ...]:
    """Say what a task lacks or does that would make a study untrustworthy.

    Args:
        task: Any object; what it lacks of a task is what is reported.
        batch_size: Samples of a training batch, >= 1.
        num_batches: Training batches compared, >= 1; raise it where a fault is rare.
        seed: Seed of the compared streams, >= 0.

    Returns:
        One sentence per finding; empty if all is well. What the task keeps, shares or changes is
        looked for once its methods are sound one by one; two short trials are part of that.
        Global random states and torch's global settings are left as they were found.

    Example:
        >>> check_task(object())
        ('The method `model` is missing.', 'The method `batches` is missing.', \
'The method `probe` is missing.', 'The method `loss` is missing.')
    """
    missing = [name for name in REQUIRED_METHODS if not callable(getattr(task, name, None))]
    if missing:
        return tuple(f"The method `{name}` is missing." for name in missing)
    # Seeding reaches every GPU; fork_rng without their names warns of two or more.
    gpus = range(torch.cuda.device_count())
    with torch.random.fork_rng(gpus, device_type="cuda"), other_random_states_kept():
        findings = _with_settings(_check_methods(task, batch_size, num_batches, seed))
        if not findings:
            findings = _with_settings(
                find_side_effects(task, batch_size=batch_size, num_batches=num_batches, seed=seed)
            )
    if not isinstance(task, HasBaseline):
        findings.append(
            "The method `baseline` is missing: return the probe loss of the best prediction that "
            "ignores its input, so that progress is not measured from a poor start."
        )
    return tuple(findings)


def _with_settings(findings: Iterator[str]) -> list[str]:
    """Look for findings, and for settings of the process that were changed meanwhile."""
    with settings_restored() as changed:
        found = list(findings)
    return found + [
        f"The task leaves {name} changed; other tasks share the process." for name in changed
    ]


def _check_methods(task: Task, batch_size: int, num_batches: int, seed: int) -> Iterator[str]:
    seed_everything(seed)
    model: object = task.model()
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        yield f"`model` must return a torch.nn.Module, but returned {got}."
        return
    yield from _check_model(task, model, seed)
    yield from _check_batches(task, batch_size, num_batches, seed)
    yield from _check_probe(task)
    yield from _check_loss(task, model, batch_size, seed)
    yield from _check_optional(task, model)


def _check_model(task: Task, model: nn.Module, seed: int) -> Iterator[str]:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield "`model` has no parameter to train."
    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        yield "`model` starts with a parameter that is NaN or infinite."
    seed_everything(seed)
    if fingerprint(model.state_dict()) != fingerprint(task.model().state_dict()):
        yield (
            "`model` gives other weights under the same seed; take its randomness from "
            "torch's global generator, which is seeded before the call."
        )


def _check_batches(task: Task, batch_size: int, num_batches: int, seed: int) -> Iterator[str]:
    def draw(stream_seed: int, global_seed: int) -> list[bytes]:
        seed_everything(global_seed)
        batches = task.batches(batch_size, torch.Generator().manual_seed(stream_seed))
        return [fingerprint(batch) for batch in itertools.islice(batches, num_batches)]

    first = draw(seed, seed)
    if len(first) < num_batches:
        yield f"`batches` must never end, but ended after {len(first)}; wrap it in a loop."
    seed_everything(seed)
    before = random_state()
    again = draw(seed, seed)
    if random_state() != before:
        yield (
            "`batches` draws from a global random state (torch, numpy or random); "
            "use the generator it is given."
        )
    if again != first:
        yield "`batches` gives other batches under the same generator seed."
    elif draw(seed, seed + _OTHER_SEED) != first:
        yield "`batches` depends on the global random state; use the generator it is given."
    elif draw(seed + _OTHER_SEED, seed) == first:
        yield "`batches` ignores its generator: another seed gives the same batches."


def _check_probe(task: Task) -> Iterator[str]:
    seed_everything(0)
    before = random_state()
    probe = task.probe()
    first = fingerprint(list(probe))
    seed_everything(_OTHER_SEED)
    if fingerprint(list(task.probe())) != first:
        yield "`probe` must return the same batches at every call, but they differ."
    seed_everything(0)
    task.probe()
    if random_state() != before:
        yield "`probe` draws from a global random state; give it a generator with a fixed seed."
    if len(probe) < _MIN_PROBE_BATCHES:
        yield (
            f"`probe` should have at least {_MIN_PROBE_BATCHES} batches, so that its noise can "
            f"be estimated, but has {len(probe)}."
        )


def _check_loss(task: Task, model: nn.Module, batch_size: int, seed: int) -> Iterator[str]:
    model.train()
    batch = next(iter(task.batches(batch_size, torch.Generator().manual_seed(seed))), None)
    if batch is None:
        return  # said already: the stream must not end
    loss = task.loss(model, batch)
    yield from _check_scalars("loss", "a training batch", loss)
    if not _has_gradient(loss):
        yield "`loss` does not depend on a trainable parameter: it has no gradient."
    model.eval()
    measure: Callable[[nn.Module, Batch], Any] = (
        task.probe_loss if isinstance(task, HasProbeLoss) else task.loss
    )
    name = "probe_loss" if isinstance(task, HasProbeLoss) else "loss"
    with torch.no_grad():
        for index, probe_batch in enumerate(task.probe()):
            found = list(_check_scalars(name, f"probe batch {index}", measure(model, probe_batch)))
            if found:
                yield from found
                return  # the others would say the same


def _check_scalars(name: str, where: str, loss: object) -> Iterator[str]:
    terms = loss if isinstance(loss, Mapping) else {"": loss}
    if not terms:
        yield f"`{name}` must name at least one term, but returned an empty dict on {where}."
    for term, value in terms.items():
        what = f"`{name}`" + (f" (term `{term}`)" if term else "")
        if not isinstance(value, Tensor):
            yield f"{what} must be a tensor, but is {type(value).__name__} on {where}."
        elif value.ndim:
            yield (
                f"{what} must be a scalar, but has shape {tuple(value.shape)} on {where}; "
                "take its mean."
            )
        elif not math.isfinite(value.item()):
            yield f"{what} must be finite at the start, but is {value.item()} on {where}."


def _has_gradient(loss: object) -> bool:
    terms = loss.values() if isinstance(loss, Mapping) else [loss]
    return any(isinstance(term, Tensor) and term.requires_grad for term in terms)


def _check_optional(task: Task, model: nn.Module) -> Iterator[str]:
    if isinstance(task, HasBaseline):
        yield from _check_baseline(task)
    if isinstance(task, HasMetrics):
        yield from _check_metrics(task, model, task.probe())
    if isinstance(task, HasInitGainParameters):
        known = {name for name, _ in model.named_parameters()}
        for name in task.init_gain_parameters(model):
            if name not in known:
                yield f"`init_gain_parameters` names `{name}`, which the model does not have."
    if isinstance(task, HasParameterGroups):
        yield from _check_groups(task.parameter_groups(model), model)


def _check_baseline(task: HasBaseline) -> Iterator[str]:
    seed_everything(0)
    first: object = task.baseline()
    seed_everything(_OTHER_SEED)
    if isinstance(first, bool) or not isinstance(first, int | float) or not math.isfinite(first):
        yield f"`baseline` must return a finite number, but returned {first!r}."
    elif task.baseline() != first:
        yield "`baseline` must return the same number at every call, but they differ."


def _check_metrics(task: HasMetrics, model: nn.Module, probe: Sequence[Batch]) -> Iterator[str]:
    if not probe:
        return  # said already
    with torch.no_grad():
        metrics: Mapping[str, object] = task.metrics(model, probe[0])
    for name, value in metrics.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            yield f"`metrics` must return finite numbers, but `{name}` is {value!r}."


def _check_groups(groups: Sequence[Mapping[str, Any]], model: nn.Module) -> Iterator[str]:
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            yield f"`parameter_groups` leaves out `{name}`; it would never be trained."
