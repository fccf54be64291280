"""What the settings change in a model before its first step."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from stability_search.engine.checkpointing import require_blocks
from stability_search.engine.half_weights import store_weights
from stability_search.errors import UsageError
from stability_search.settings.engine import EngineSettings

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
        require_blocks(model)
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
