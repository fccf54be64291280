"""Gradient checkpointing of any model: blocks are computed again in the backward pass."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from stability_search.engine.overrides import Forward, ForwardOverrides
from stability_search.errors import UsageError


def checkpoint_blocks(model: nn.Module) -> Callable[[], None]:
    """Recompute the activations of every block in the backward pass.

    Models (or parts) with a `gradient_checkpointing_enable` method do it themselves; elsewhere
    blocks are the outermost members of `nn.ModuleList` and `nn.Sequential` containers. Recomputing
    leaves buffers alone, so that BatchNorm counts each batch once.

    Returns:
        What undoes it.

    Raises:
        UsageError: The model has no blocks, or one of them changes its input in place (found when
            it first runs).
    """
    own, blocks = require_blocks(model)
    overrides = ForwardOverrides()
    undo = contextlib.ExitStack()
    undo.callback(overrides.undo)
    for part in own:
        undo.callback(_enable(part))
        for module in part.modules():
            if isinstance(module, _BatchNorm):
                overrides.replace(module, functools.partial(functools.partial, _counted, module))
    for name, block in blocks.items():
        overrides.replace(block, functools.partial(functools.partial, _checkpointed, block, name))
    return undo.close


def require_blocks(model: nn.Module) -> tuple[list[nn.Module], dict[str, nn.Module]]:
    """Return the parts that checkpoint themselves, and the blocks elsewhere by name.

    Raises:
        UsageError: There are none of either.
    """
    own = _outermost([m for m in model.modules() if _can_checkpoint_itself(m)])
    inside = {module for part in own for module in part.modules()}
    blocks = {n: b for n, b in _outermost_blocks(model).items() if b not in inside}
    if not own and not blocks:
        raise UsageError(
            "gradient_checkpointing: the model has no nn.ModuleList or nn.Sequential of blocks.",
            hint="Give it a gradient_checkpointing_enable() method, or leave the setting off.",
        )
    return own, blocks


def _can_checkpoint_itself(module: nn.Module) -> bool:
    # Hugging Face gives every model the method, and most of them this attribute.
    is_supported = getattr(module, "supports_gradient_checkpointing", True)
    return bool(is_supported) and callable(getattr(module, "gradient_checkpointing_enable", None))


def _outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    inside = {inner for module in modules for inner in list(module.modules())[1:]}
    return [module for module in modules if module not in inside]


def _enable(part: nn.Module) -> Callable[[], None]:
    """Let a model checkpoint itself; return what undoes it."""
    hooks = {module: set(module._forward_hooks) for module in part.modules()}  # noqa: SLF001 - to see new ones
    for kind in ("activation", "gradient"):  # Hugging Face's present name and its former one
        enable = getattr(part, f"{kind}_checkpointing_enable", None)
        if not callable(enable):
            continue
        if getattr(part, f"is_{kind}_checkpointing", False) is True:
            return lambda: None  # its owner has asked for it
        option = f"{kind}_checkpointing_kwargs"
        if option in inspect.signature(enable).parameters:
            # The other kind loses the gradient of whatever follows a frozen embedding.
            enable(**{option: {"use_reentrant": False}})
        else:
            enable()
        disable = getattr(part, f"{kind}_checkpointing_disable", lambda: None)
        new = {module: set(module._forward_hooks) - old for module, old in hooks.items()}  # noqa: SLF001 - as above
        return functools.partial(_disable, disable, new)
    raise AssertionError(part)  # nobody asks without having looked


def _disable(disable: Callable[[], None], hooks: dict[nn.Module, set[int]]) -> None:
    disable()
    for module, keys in hooks.items():  # transformers 5.23 leaves one on the embedding
        for key in keys:
            module._forward_hooks.pop(key, None)  # noqa: SLF001 - no public way to another's hook


def _outermost_blocks(model: nn.Module) -> dict[str, nn.Module]:
    names = {module: name for name, module in model.named_modules()}
    blocks: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():  # outer modules come first
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for block in _callable_members(module):
                # One that works in place has nothing to recompute, and would do it twice.
                if block not in inside and getattr(block, "inplace", False) is not True:
                    blocks[names[block]] = block
                    inside.update(block.modules())
    return blocks


def _callable_members(container: nn.Module) -> Iterator[nn.Module]:
    for member in container.children():
        if isinstance(member, (nn.ModuleList, nn.ModuleDict)):  # nobody calls these
            yield from _callable_members(member)
        else:
            yield member


@_disable_dynamo  # torch.compile cannot trace checkpoint's context_fn
def _checkpointed(
    block: nn.Module,
    name: str,
    forward: Forward,
    *args: Any,  # noqa: ANN401 - the block's own
    **kwargs: Any,  # noqa: ANN401 - the block's own
) -> Any:  # noqa: ANN401 - the block's own
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    inputs = [
        x
        for x in (*args, *kwargs.values())
        if isinstance(x, torch.Tensor) and not x.is_inference()  # which has no version
    ]
    versions = [x._version for x in inputs]  # noqa: SLF001 - the only way to see a change in place
    output = checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _buffers_kept(block)),
        **kwargs,
    )
    if versions != [x._version for x in inputs]:  # noqa: SLF001 - as above
        raise UsageError(
            f"gradient_checkpointing: a block must leave its input alone to be run twice, but "
            f"{name} ({type(block).__name__}) changes it in place.",
            hint="Build it with inplace=False, or leave the setting off.",
        )
    return output


def _counted(
    norm: nn.Module,
    forward: Forward,
    *args: Any,  # noqa: ANN401 - the norm's own
    **kwargs: Any,  # noqa: ANN401 - the norm's own
) -> Any:  # noqa: ANN401 - the norm's own
    is_recomputed = torch._C._current_graph_task_id() != -1  # noqa: SLF001 - as checkpoint itself asks
    with _buffers_kept(norm) if is_recomputed else contextlib.nullcontext():
        return forward(*args, **kwargs)


@contextlib.contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    kept = [
        (module._buffers, name, buffer, buffer.clone())  # noqa: SLF001 - by name: see below
        for module in block.modules()
        for name, buffer in module._buffers.items()  # noqa: SLF001 - as above
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, copy in kept:
                buffers[name] = buffer.copy_(copy)  # also where it was assigned anew
