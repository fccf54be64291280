"""A field report as code: the loop that failed, the team's cure, and the study that replaces both.

A case has no guard of ours in it: its loops are plain PyTorch, as the report's team wrote them.
`tests/benchmarks/field` puts them beside the guarded engine and the choice of a study.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainEnd:
    """How a training without our guards ended.

    Attributes:
        failed_at: First step, from 1, that raised, or after which the loss or a parameter was not
            finite, or from which on nothing was trained any more; None where it survived.
        failure: What happened there, in a few words (`RuntimeError: unscale_() has already been
            called`, `NaN loss`); empty where it survived.
        num_steps: Attempted steps.
        num_skipped: Of them, those that changed no parameter.
        probe_loss: Mean probe loss at the end, in fp32 and eval mode; None if it is not finite.
    """

    failed_at: int | None
    failure: str
    num_steps: int
    num_skipped: int
    probe_loss: float | None


PlainLoop = Callable[[int, int], PlainEnd]
"""Trains from a seed (>= 0) for a number of steps (>= 1), unless it fails before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldCase:
    """One report.

    Attributes:
        report: Its number, from 1.
        system: The built-in task.
        space: Name of the shipped space file. Its first `start_with` is the configuration that
            failed; a study of it gives the choice.
        num_steps: Steps of the plain loops; the guarded ones take the space file's horizons.
        unguarded: The loop that failed, with the settings it failed under.
        fix_as_written: The same with the team's cure, as their script has it.
        fix_as_meant: The cure with the mistakes taken out of it; the same function where there
            are none.
    """

    report: int
    system: str
    space: str
    num_steps: int
    unguarded: PlainLoop
    fix_as_written: PlainLoop
    fix_as_meant: PlainLoop
