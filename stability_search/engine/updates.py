"""How large updates are beside weights and gradients beside `eps`, and how many are zero.

Looking at every weight at every step would cost as much as clipping does. In every fourth step
one weight matrix is looked at, each in its turn, and only some rows of a large one, so that time
and memory stay the same however large the model is.
"""

import math
from collections.abc import Sequence

import torch

from stability_search.engine.signals import Signals

STEPS_PER_LOOK = 4
_MAX_ENTRIES = 2**14


class UpdateWatch:
    """Compare one weight matrix before and after its update.

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
            turn: Decides which one.
        """
        self._part = None
        if not self._matrices:
            return
        matrix = self._matrices[turn % len(self._matrices)]
        gradient = matrix.grad
        if gradient is None or gradient.layout != torch.strided:
            return
        self._part = _some_rows(matrix.detach())
        self._before = self._part.clone()
        nonzero = torch.count_nonzero(_some_rows(gradient))
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
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._factors = [
            # Norm times this is RMS over eps; 0 leaves biases and scales out.
            1.0 / (math.sqrt(p.numel()) * group["eps"])
            if group.get("eps") and p.dim() > 1 and p.numel()
            else 0.0
            for group in optimizer.param_groups
            for p in group["params"]
        ]

    def smallest(self, norms: Sequence[float]) -> float | None:
        """Return the smallest RMS of a gradient over `eps`; None with nothing to compare.

        A gradient of zero is no small gradient: nothing of it reaches Adam.

        Args:
            norms: L2 norm of each gradient there is, in the order of the parameters.
        """
        factors = self._factors
        if len(norms) < len(factors):
            pairs = zip(factors, self._parameters, strict=True)
            factors = [factor for factor, p in pairs if p.grad is not None]
        ratios = (norm * factor for norm, factor in zip(norms, factors, strict=True))
        return min((ratio for ratio in ratios if ratio > 0), default=None)


def _some_rows(matrix: torch.Tensor) -> torch.Tensor:
    """Return a view of rows spread over the matrix, of some 16,000 entries, at least one row."""
    num_rows = max(1, _MAX_ENTRIES // math.prod(matrix.shape[1:]))
    return matrix[:: -(-matrix.shape[0] // num_rows)]
