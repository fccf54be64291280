"""Everything that is said of two runs beside each other."""

from dataclasses import dataclass
from pathlib import Path

from stability_search.comparison.differences import (
    Difference,
    setting_differences,
    space_differences,
)
from stability_search.comparison.obstacles import caveats, reasons
from stability_search.comparison.pairs import Pairing, pair_up
from stability_search.comparison.sides import Side, read_side


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Comparison:
    """Two runs beside each other; the first is A, the second B.

    Attributes:
        paths: The run directories, as they were given.
        sides: What each left behind.
        reasons: Why the runs cannot be compared; empty where they can.
        caveats: What to bear in mind, a sentence each.
        space: What was asked of one and not of the other.
        settings: Settings that the two configurations of the verdicts do not share.
        pairing: The test on the seeds in common; None where the runs cannot be compared.
    """

    paths: tuple[Path, Path]
    sides: tuple[Side, Side]
    reasons: tuple[str, ...]
    caveats: tuple[str, ...]
    space: tuple[Difference, ...]
    settings: tuple[Difference, ...]
    pairing: Pairing | None


def compare(first: Path, second: Path) -> Comparison:
    """Put two runs beside each other, and test the seeds they share where q means the same.

    Nothing that a run names is imported, nothing is written, and neither ledger is opened.

    Args:
        first: A run directory with its tables and report; A.
        second: Another, or the same; B.

    Raises:
        UsageError: One of them cannot be read.
    """
    ours, theirs = read_side(first), read_side(second)
    why_not = reasons(ours, theirs)
    return Comparison(
        paths=(first, second),
        sides=(ours, theirs),
        reasons=why_not,
        caveats=caveats(ours, theirs),
        space=space_differences(ours.space, theirs.space),
        settings=setting_differences(ours, theirs),
        pairing=None if why_not else pair_up(ours, theirs),
    )
