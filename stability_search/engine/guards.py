"""Which label a step gets, from facts the engine has already brought to the host.

Plain Python on purpose: a verdict about a step can be read and tested without a model.
"""

from dataclasses import dataclass

from stability_search.records.step import PROOF_STEPS, StepLabel


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """What is known about one window at its end.

    Attributes:
        state_fault: What of parameters and optimizer state is NaN or infinite after the step;
            empty if nothing is.
        batch_fault: Why the batch is at fault; empty if it is not or nobody had to ask.
        forward_fault: What was non-finite in a forward pass or a loss; empty if nothing was.
        grad_fault: What is wrong with the gradients; empty if they and their squares are finite.
        scale: Loss scale of the step; None without loss scaling.
        proven_scale: Largest loss scale known to work.
    """

    state_fault: str
    batch_fault: str
    forward_fault: str
    grad_fault: str
    scale: float | None
    proven_scale: float

    @property
    def is_finite(self) -> bool:
        """True if nothing about the step was non-finite."""
        return not self.state_fault and not self.forward_fault and not self.grad_fault


def label_step(facts: StepFacts) -> tuple[StepLabel, str]:
    """Label a step by the first rule that matches.

    Args:
        facts: What is known about the step.

    Returns:
        The label and its reason, which is empty for `ok`.

    Source:
        Step labels, stability_search/README.md.

    Example:
        >>> facts = StepFacts(state_fault="", batch_fault="", forward_fault="",
        ...                   grad_fault="gradient is Inf", scale=65536.0, proven_scale=0.0)
        >>> label_step(facts)[0].value
        'calibration'
    """
    if facts.state_fault:
        return StepLabel.BAD, facts.state_fault
    if facts.batch_fault and not facts.is_finite:
        return StepLabel.DATA, facts.batch_fault
    if facts.forward_fault:
        return StepLabel.BAD, facts.forward_fault
    if not facts.grad_fault:
        return StepLabel.OK, ""
    return _label_overflow(facts.grad_fault, facts.scale, facts.proven_scale)


def _label_overflow(fault: str, scale: float | None, proven_scale: float) -> tuple[StepLabel, str]:
    if scale is None:
        return StepLabel.BAD, fault
    if scale > max(proven_scale, 1.0):
        reason = f"gradient overflow while finding the loss scale {scale:g}"
        return StepLabel.CALIBRATION, reason
    known = ", known to work" if scale <= proven_scale else ""
    return StepLabel.BAD, f"{fault} at loss scale {scale:g}{known}"


class ScaleProof:
    """Remember the largest loss scale that is known to work.

    A scale is proven by `ok` steps; a fall keeps the count, because surviving a scale also
    vouches for smaller ones. A `bad` overflow withdraws the proof, so that the next growth probe
    is a calibration again.
    """

    def __init__(self) -> None:
        self.proven_scale = 0.0
        self._num_ok_since_rise = 0

    def step_was_ok(self, scale: float) -> None:
        """Count an `ok` step taken at `scale`."""
        self._num_ok_since_rise += 1
        if self._num_ok_since_rise >= PROOF_STEPS:
            self.proven_scale = max(self.proven_scale, scale)

    def scale_rose(self) -> None:
        """Start the count again: the new scale has proven nothing yet."""
        self._num_ok_since_rise = 0

    def overflow_was_bad(self, scale: float) -> None:
        """Withdraw the proof of every scale above half of this one."""
        self.proven_scale = min(self.proven_scale, scale / 2)

    def state_dict(self) -> dict[str, float]:
        """Return what `load_state_dict` needs."""
        return {
            "proven_scale": self.proven_scale,
            "num_ok_since_rise": float(self._num_ok_since_rise),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self.proven_scale = state["proven_scale"]
        self._num_ok_since_rise = int(state["num_ok_since_rise"])
