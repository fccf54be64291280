"""How large updates are beside weights and gradients beside `eps`, and how many are zero.

Looking at every weight at every step would cost as much as clipping does. One weight matrix is
looked at in each step, each in its turn, and only the first million entries of a large one, so
that time and memory stay the same however large the model is.
"""

import math
from collections.abc import Sequence

import torch

from stability_search.engine.signals import Signals

_MAX_ENTRIES = 2**20


class UpdateWatch:
    """Compare one weight matrix a step before and after its update.

    Args:
        parameters: Those of the optimizer; only those of two or more dimensions are watched.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._matrices = [p for p in parameters if p.dim() > 1 and p.numel()]
        self._part: torch.Tensor | None = None
        self._before = torch.empty(0)
        self._zero_frac = torch.empty(0)

    def before_update(self, turn: int) -> None:
        """Remember a matrix, and how many zeros its gradient holds.

        Args:
            turn: Number of the step; decides which one.
        """
        self._part = None
        if not self._matrices:
            return
        matrix = self._matrices[turn % len(self._matrices)]
        gradient = matrix.grad
        if gradient is None or gradient.layout != torch.strided:
            return
        self._part = _first_rows(matrix.detach())
        self._before = self._part.clone()
        nonzero = torch.count_nonzero(_first_rows(gradient))
        self._zero_frac = 1.0 - nonzero / self._part.numel()

    def after_update(self, signals: Signals) -> None:
        """Add what the update did: its RMS over that of the weights (Inf if those were zero).

        Args:
            signals: Gets `update_ratio` and `zero_grad_frac`.
        """
        if self._part is None:
            return
        weight_norm = torch.linalg.vector_norm(self._before)
        update_norm = torch.linalg.vector_norm(self._before.sub_(self._part))
        self._part = None
        signals.add("update_ratio", 0, [update_norm / weight_norm])
        signals.add("zero_grad_frac", 0, [self._zero_frac])


class EpsWatch:
    """Compare the gradient of every weight matrix with Adam's `eps`.

    Args:
        optimizer: Where its groups have no `eps`, there is nothing to compare with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._weights = [
            # Norm times this is RMS over eps; 0 leaves biases and scales out.
            1.0 / (math.sqrt(p.numel()) * group["eps"]) if p.dim() > 1 and p.numel() else 0.0
            for group in optimizer.param_groups
            if "eps" in group
            for p in group["params"]
        ]
        self._present: tuple[bool, ...] = ()
        self._factors = torch.empty(0)

    def smallest(self, norms: torch.Tensor, present: tuple[bool, ...]) -> torch.Tensor | None:
        """Return the smallest RMS of a gradient over `eps`, 0-d; None with nothing to compare.

        Args:
            norms: L2 norm of each gradient there is, one dimension.
            present: For each parameter of the optimizer, whether it has a gradient.
        """
        if not self._weights:
            return None
        if present != self._present:
            self._present = present
            factors = [
                w for w, is_present in zip(self._weights, present, strict=True) if is_present
            ]
            self._factors = torch.tensor(factors, device=norms.device, dtype=norms.dtype)
        ratios = norms * self._factors
        # A gradient of zero is no small gradient: nothing of it reaches Adam.
        return torch.where(ratios > 0, ratios, math.inf).amin()


def _first_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a view of the first rows that hold no more than a million entries, at least one."""
    rows = max(1, _MAX_ENTRIES // math.prod(matrix.shape[1:]))
    return matrix if rows >= matrix.shape[0] else matrix[:rows]
