"""The gradient norm, and the scaling that clipping asks for.

Clipping on a non-finite norm writes NaN into every gradient; here the norm is judged with the
step, and the update is skipped on the device, so such a gradient is never used.
"""

from collections.abc import Sequence

import torch

NONFINITE_GRADIENT = "gradient is NaN or Inf"
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s own


def tensor_norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of each gradient, one dimension; NaN or Inf where a value is.

    The norm of the result is `torch.nn.utils.get_total_norm` of gradients of one type, to the bit.
    """
    return torch.stack(torch._foreach_norm(list(gradients)))  # noqa: SLF001 - no public name


def gradient_fault(gradients: Sequence[torch.Tensor]) -> str:
    """Say what is wrong with gradients that failed the judgement of their norm.

    Args:
        gradients: As `rescale_gradients` left them: what was NaN or Inf still is.
    """
    if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        return "gradient norm is 9.2e+18 or more, and its square overflows"
    return NONFINITE_GRADIENT


def clip_factor(norm: float, clip_norm: float) -> float:
    """Return what clipping multiplies a gradient of this norm by, in (0, 1]."""
    return min(1.0, clip_norm / (norm + CLIP_EPS))


def rescale_gradients(
    gradients: Sequence[torch.Tensor],
    norm: torch.Tensor,
    *,
    inverse_scale: float,
    clip_norm: float | None,
) -> None:
    """Undo the loss scale and clip, in one pass over the gradients.

    Args:
        gradients: Gradients of the scaled loss, changed in place.
        norm: Their unscaled L2 norm, 0-d.
        inverse_scale: 1 / loss scale; 1 without loss scaling.
        clip_norm: Largest norm left; None turns clipping off.
    """
    if clip_norm is None:
        if inverse_scale != 1.0:
            torch._foreach_mul_(list(gradients), inverse_scale)
        return
    factor = torch.clamp(clip_norm / (norm + CLIP_EPS), max=1.0)
    if inverse_scale != 1.0:
        factor = factor * inverse_scale
    torch._foreach_mul_(list(gradients), factor)
