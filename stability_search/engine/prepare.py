"""What the settings change in a model before its first step."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import checkpoint

from stability_search.engine.half_weights import keep_no_half_precision, store_weights
from stability_search.engine.overrides import Forward, ForwardOverrides
from stability_search.errors import UsageError
from stability_search.settings import EngineSettings

__all__ = ["checkpoint_blocks", "keep_no_half_precision", "prepare_model"]

NUM_GROUPS = 8  # groups of a GroupNorm that replaces a BatchNorm, or the largest divisor below


def prepare_model(
    model: nn.Module, settings: EngineSettings, *, init_gain_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Change the model as the settings say, in place and for good.

    Everything is checked before anything is changed.

    Args:
        model: The model, on its device.
        settings: `norm`, `init_gain`, `precision`, `gradient_checkpointing` and, for what memory
            costs, `optimizer` are used.
        init_gain_names: Parameters that `init_gain` multiplies; None for every trainable one of
            two or more dimensions.

    Returns:
        What a reader of the log should know, one sentence each.

    Raises:
        UsageError: The model cannot be trained as it is, or has nothing that a setting could act
            on.
    """
    _check_parameters(model)
    _check_precision_reaches(model, settings)
    is_grouped = settings.norm == "group"
    if is_grouped and not any(isinstance(m, _BatchNorm) for m in list(model.modules())[1:]):
        raise UsageError(
            "norm: `group` replaces BatchNorm, but the model has none.", hint="Leave it at keep."
        )
    scaled = (
        _gain_parameters(model, init_gain_names, settings.init_gain)
        if settings.init_gain != 1.0
        else []
    )
    if settings.gradient_checkpointing:
        _require_blocks(model)
    notes = store_weights(model, settings)
    if is_grouped:
        _replace_batch_norm(model)
    with torch.no_grad():
        for parameter in scaled:
            parameter.mul_(settings.init_gain)
    return tuple(notes)


# -- what no setting could train ------------------------------------------------------------


def _check_parameters(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(
                f"model: every parameter must have a shape, but {name} has none yet (a lazy "
                "module).",
                hint="Call the model once on a batch before it is trained, or name its sizes.",
            )
        if tensor.is_meta:
            raise UsageError(
                f"model: every parameter must have a value, but {name} is on the meta device.",
                hint="Build the model, or load its weights, on a real device.",
            )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                "model: it must be made of Python modules, but "
                f"{name or 'the model'} is a ScriptModule, which nothing can be done inside of.",
                hint="Give the module that was scripted, or torch.compile it.",
            )
        is_sparse = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if is_sparse and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise UsageError(
                f"model: gradients must be dense, but {name or type(module).__name__} is an "
                "embedding with sparse=True.",
                hint="Build it with sparse=False.",
            )
    check_one_device([p for p in model.parameters() if p.requires_grad])


def check_one_device(parameters: Sequence[torch.Tensor]) -> None:
    """Refuse a model whose trainable parameters are spread over devices.

    Raises:
        UsageError: They are.
    """
    devices = sorted({str(p.device) for p in parameters})
    if len(devices) > 1:
        raise UsageError(
            "model: all trainable parameters must be on one device, but they are on "
            f"{', '.join(devices)}.",
            hint="Move the model as a whole; frozen parts may be elsewhere.",
        )


def _check_precision_reaches(model: nn.Module, settings: EngineSettings) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dim() > 1}
    if settings.precision != "fp32" and dtypes == {torch.float64}:
        raise UsageError(
            f"precision: {settings.precision} is computed from fp32 weights, but every weight "
            "matrix of the model is float64, which autocast leaves alone.",
            hint="Call .float() on the model, or leave the precision at fp32.",
        )


# -- init_gain ------------------------------------------------------------------------------


def _gain_parameters(
    model: nn.Module, names: Sequence[str] | None, gain: float
) -> list[nn.Parameter]:
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
        raise UsageError(
            f"init_gain: a gain of {gain:g} needs a trainable weight matrix to multiply, but the "
            "model has none.",
            hint="Leave it at 1.",
        )
    return chosen


# -- norm -----------------------------------------------------------------------------------


def _replace_batch_norm(model: nn.Module) -> None:
    made: dict[nn.Module, nn.GroupNorm] = {}  # a norm used in two places stays one norm
    names = {module: name for name, module in model.named_modules()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # noqa: SLF001 - every name, also of one child
            if isinstance(child, _BatchNorm):
                if child not in made:
                    made[child] = _group_norm(child, names[child])
                setattr(parent, name, made[child])


def _group_norm(batch_norm: _BatchNorm, name: str) -> nn.GroupNorm:
    channels = batch_norm.num_features
    groups = next(n for n in range(NUM_GROUPS, 0, -1) if channels % n == 0)
    group_norm = nn.GroupNorm(groups, channels, eps=batch_norm.eps, affine=batch_norm.affine)
    if batch_norm.affine:
        # The very parameters, so that ties, names and trainability survive.
        group_norm.weight, group_norm.bias = batch_norm.weight, batch_norm.bias
    if groups == channels:
        _refuse_lone_values(group_norm, name)
    return group_norm.train(batch_norm.training)


def _refuse_lone_values(group_norm: nn.GroupNorm, name: str) -> None:
    """Look at the first input: a value normalised by itself is always zero."""

    def check(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if math.prod(args[0].shape[1:]) == group_norm.num_groups:
            raise UsageError(
                f"norm: `group` needs more than one value in a group, but {name} has "
                f"{group_norm.num_channels} channels and {group_norm.num_groups} groups, so that "
                "each value would be normalised to zero.",
                hint="Leave it at keep, or give the layer more channels.",
            )
        hook.remove()

    hook = group_norm.register_forward_pre_hook(check)


# -- gradient checkpointing -----------------------------------------------------------------


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
    own, blocks = _require_blocks(model)
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


def _require_blocks(model: nn.Module) -> tuple[list[nn.Module], dict[str, nn.Module]]:
    """Return the parts that checkpoint themselves, and the blocks elsewhere by name."""
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
