"""What to type next, to the letter."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from stability_search.records.trial import Outcome
from stability_search.settings.trial import TrialConfig
from stability_search.training.checkpoint import Checkpoint
from stability_search.training.standstill import Standstill

_WHY_NOT_ON = {
    Outcome.DIVERGED: "learning_rate is too high for this long a run.",
    Outcome.PRUNED: "NaN or Inf comes too often for these settings.",
    Outcome.SCALE_COLLAPSE: "gradients do not fit fp16; bf16 or fp32 would need a new training.",
    Outcome.NONFINITE_PARAMETERS: "the parameters are NaN or Inf and cannot be saved.",
    Outcome.OUT_OF_MEMORY: "the batch does not fit; half of it with twice the accumulation does "
    "the same.",
}


def resume_command(path: Path, *options: str) -> str:
    """Return the command that goes on with a training.

    Args:
        path: Its directory.
        options: Words after it.
    """
    return shlex.join(["stability-search", "train", "--resume", str(path), *options])


def after_stop(
    path: Path,
    outcome: Outcome | Standstill | None,
    config: TrialConfig,
    best: Checkpoint | None,
) -> tuple[str, ...]:
    """Say how to go on after a rule stopped a training.

    Args:
        path: Its directory.
        outcome: The rule; None for an alarm.
        config: What it was trained with.
        best: The best checkpoint; None where none was measured.
    """
    if isinstance(outcome, Standstill):
        return (
            "look at the task's loss and the data: `stability-search diagnose` tells them apart.",
            "mend the task, then begin anew with `stability-search train --space`.",
        )
    which = "last" if best is None else "best"
    where = f"the {which} checkpoint"
    if best is not None:
        where += f" (step {best.step}, probe loss {best.probe:.4g})"
    if outcome is Outcome.OUT_OF_MEMORY:
        options = _smaller_batch(config)
        how = f"go on from {where}:"
    else:
        options = ["--set", f"fixed.learning_rate={config.engine.learning_rate / 10:.6g}"]
        how = f"go on from {where} with a tenth of the learning rate:"
    why = "an alarm ended it (alarms.on_alarm)." if outcome is None else _WHY_NOT_ON[outcome]
    return (why, how, f"  {resume_command(path, '--from', which, *options)}")


def _smaller_batch(config: TrialConfig) -> Sequence[str]:
    size, windows = max(1, config.batch_size // 2), 2 * config.accumulation_steps
    return (
        "--set", f"fixed.batch_size={size}", "--set", f"fixed.accumulation_steps={windows}",
    )  # fmt: skip
