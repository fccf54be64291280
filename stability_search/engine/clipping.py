"""The gradient norm, and the scaling that clipping asks for.

Clipping on a non-finite norm writes NaN into every gradient; here the norm is judged with the
step, and the update is skipped on the device, so such a gradient is never used.
"""

from collections.abc import Sequence

import torch

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s own


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm over all gradients, a 0-d tensor; NaN or Inf if any value is."""
    return torch.nn.utils.get_total_norm(gradients, norm_type=2.0)


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
    factor = torch.clamp(clip_norm / (norm + CLIP_EPS), max=1.0) * inverse_scale
    torch._foreach_mul_(list(gradients), factor)
