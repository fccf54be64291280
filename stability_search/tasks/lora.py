"""LoRA: a frozen linear layer with a small trainable update beside it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class StoredLinear(nn.Linear):
    """A linear layer whose weight may be stored in another precision than it is used in.

    Autocast brings the weight to its own precision; without it the weight takes the input's. So a
    weight in fp16 can be measured in fp32 too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in features) to (..., out features)."""
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        bias: Tensor | None = self.bias
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LoraLinear(nn.Module):
    """A frozen layer plus `alpha / rank * up(down(x))`, of which only `up` and `down` learn.

    `up` starts at zero: at first the layer computes what the frozen one does, and the gradient of
    `down` is exactly zero.

    Args:
        base: The layer to adapt; frozen in place.
        rank: Inner width of the update, >= 1. Raise it for more freedom and more memory.
        alpha: Strength of the update, > 0; the update is scaled by `alpha / rank`, so that
            another rank needs no other learning rate.
        dtype: What the update is stored in. In fp16 torch's `GradScaler` refuses its gradients.

    Source:
        Hu et al. 2021, LoRA, arXiv 2106.09685.
    """

    def __init__(
        self, base: nn.Linear, *, rank: int, alpha: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.down = StoredLinear(base.in_features, rank, bias=False)
        self.up = StoredLinear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        for part in (self.down, self.up):  # drawn in fp32, so that both precisions start alike
            part.to(dtype)
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in features) to (..., out features)."""
        update: Tensor = self.up(self.down(x))
        return self.base(x) + self.scaling * update  # type: ignore[no-any-return]
