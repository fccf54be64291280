"""What the settings change in a model before its first step."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from stability_search.engine.overrides import ForwardOverrides
from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

NUM_GROUPS = 8  # groups of a GroupNorm that replaces a BatchNorm, or the largest divisor below
_HALF = {torch.float16, torch.bfloat16}
_MIB = 2**20


def prepare_model(
    model: nn.Module, settings: EngineSettings, *, init_gain_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Change the model as the settings say, in place and for good.

    Args:
        model: The model, on its device.
        settings: `norm` and `init_gain` are used.
        init_gain_names: Parameters that `init_gain` multiplies; None for every trainable one of
            two or more dimensions.

    Returns:
        What a reader of the log should know, one sentence each.

    Raises:
        UsageError: The model has nothing that a setting could act on.
    """
    notes = _keep_master_weights(model)
    if settings.norm == "group":
        _replace_batch_norm(model)
    if settings.init_gain != 1.0:
        _apply_init_gain(model, settings.init_gain, init_gain_names)
    return tuple(notes)


def keep_no_half_precision(model: nn.Module) -> nn.Module:
    """Turn every half-precision parameter and buffer into fp32, in place; return the model."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in _HALF:
            tensor.data = tensor.data.float()
    return model


def _keep_master_weights(model: nn.Module) -> list[str]:
    halves = [p for p in model.parameters() if p.requires_grad and p.dtype in _HALF]
    if not halves:
        return []
    extra_mib = sum(p.numel() * 2 for p in halves) / _MIB
    dtype = str(halves[0].dtype).removeprefix("torch.")
    chosen = {id(p) for p in halves}
    for module in model.modules():
        if any(id(p) in chosen for p in module.parameters(recurse=False)):
            # A BatchNorm takes statistics in the precision of its weight only.
            for buffer in module.buffers(recurse=False):
                if buffer.dtype in _HALF:
                    buffer.data = buffer.data.float()
    for parameter in halves:
        parameter.data = parameter.data.float()
    note = (
        f"{len(halves)} trainable parameters were stored in {dtype}; they are kept as fp32 "
        f"master weights, {extra_mib:.1f} MiB more (frozen ones stay as they are)"
    )
    return [note]


def _apply_init_gain(model: nn.Module, gain: float, names: Sequence[str] | None) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if names is None:
        chosen = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    else:
        unknown = sorted(set(names) - set(parameters))
        if unknown:
            raise UsageError(
                f"init_gain_parameters: every name must be a parameter of the model, but got "
                f"{', '.join(unknown)}.",
                hint="Compare with the names of model.named_parameters().",
            )
        chosen = list({id(parameters[name]): parameters[name] for name in names}.values())
    if not chosen:
        raise UsageError("init_gain: the model has no weight matrix to multiply.")
    with torch.no_grad():
        for parameter in chosen:
            parameter.mul_(gain)


def _replace_batch_norm(model: nn.Module) -> None:
    made: dict[nn.Module, nn.GroupNorm] = {}  # a norm used in two places stays one norm
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001 - every name, also of one child
            if isinstance(child, _BatchNorm):
                made.setdefault(child, _group_norm(child))
                setattr(parent, name, made[child])
    if not made:
        raise UsageError(
            "norm: `group` replaces BatchNorm, but the model has none.", hint="Leave it at keep."
        )


def _group_norm(batch_norm: _BatchNorm) -> nn.GroupNorm:
    channels = batch_norm.num_features
    groups = next(n for n in range(NUM_GROUPS, 0, -1) if channels % n == 0)
    group_norm = nn.GroupNorm(groups, channels, eps=batch_norm.eps, affine=batch_norm.affine)
    if batch_norm.affine:
        # The very parameters, so that ties, names and trainability survive.
        group_norm.weight, group_norm.bias = batch_norm.weight, batch_norm.bias
    return group_norm.train(batch_norm.training)


# -- gradient checkpointing -----------------------------------------------------------------


def checkpoint_blocks(model: nn.Module) -> Callable[[], None]:
    """Recompute the activations of every block in the backward pass.

    A model with `gradient_checkpointing_enable()` does it itself; otherwise blocks are the
    outermost members of its `nn.ModuleList` and `nn.Sequential` containers. Recomputing leaves
    buffers alone, so that BatchNorm counts each batch once.

    Returns:
        What undoes it.

    Raises:
        UsageError: The model has no blocks.
    """
    enable: Callable[[], None] | None = getattr(model, "gradient_checkpointing_enable", None)
    if callable(enable):
        enable()
        return getattr(model, "gradient_checkpointing_disable", lambda: None)
    blocks = _outermost_blocks(model)
    if not blocks:
        raise UsageError(
            "gradient_checkpointing: the model has no nn.ModuleList or nn.Sequential of blocks.",
            hint="Give it a gradient_checkpointing_enable() method, or leave the setting off.",
        )
    overrides = ForwardOverrides()
    for block in blocks:
        overrides.replace(block, functools.partial(functools.partial, _checkpointed, block))
    return overrides.undo


def _outermost_blocks(model: nn.Module) -> list[nn.Module]:
    blocks: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():  # outer modules come first
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for block in _callable_members(module):
                if block not in inside:
                    blocks[block] = None
                    inside.update(block.modules())
    return list(blocks)


def _callable_members(container: nn.Module) -> Iterator[nn.Module]:
    for member in container.children():
        if isinstance(member, (nn.ModuleList, nn.ModuleDict)):  # nobody calls these
            yield from _callable_members(member)
        else:
            yield member


def _checkpointed(
    block: nn.Module,
    forward: Callable[..., Any],
    *args: Any,  # noqa: ANN401 - the block's own
    **kwargs: Any,  # noqa: ANN401 - the block's own
) -> Any:  # noqa: ANN401 - the block's own
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _buffers_kept(block)),
        **kwargs,
    )


@contextlib.contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    buffers = list(block.buffers())
    copies = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)


# -- finiteness -----------------------------------------------------------------------------


def state_norm(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, turn: int
) -> torch.Tensor:
    """Return the L2 norm over parameters and second moments, 0-d; not finite if any value is.

    Nothing else of an optimizer's state can be non-finite while both are finite: a broken
    momentum breaks its parameter in the same update. A broken second moment does not, it only
    stops its parameter; but it stays broken, so the moments are read a quarter a turn.

    Args:
        parameters: Those of the optimizer.
        optimizer: Its state is looked at where it has second moments.
        turn: Which quarter of them is read, any integer.
    """
    moments = _second_moments(parameters[turn % 4 :: 4], optimizer)
    norms = torch._foreach_norm([*parameters, *moments])  # noqa: SLF001 - no public name
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def state_fault(parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer) -> str:
    """Say what of parameters and optimizer state is not finite; an empty string if nothing is.

    Asked once `state_norm` is not finite, which huge finite values are enough for.
    """
    if not _are_finite(parameters):
        return "a parameter became NaN or Inf"
    if not _are_finite(_second_moments(parameters, optimizer)):
        return "an optimizer state became NaN or Inf"
    return ""


def _second_moments(
    parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer
) -> list[torch.Tensor]:
    states = (optimizer.state.get(parameter) for parameter in parameters)
    return [state["exp_avg_sq"] for state in states if state and "exp_avg_sq" in state]


def _are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    largest = [torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors if tensor.numel()]
    return (
        all(math.isfinite(value) for value in torch.stack(largest).tolist()) if largest else True
    )
