"""The record of every step of a long training, in one Parquet file per checkpoint."""

import re
from collections.abc import Iterator
from pathlib import Path

from stability_search.records.step import StepRecord
from stability_search.step_files import read_steps, write_records

_NAME = re.compile(r"phase-(\d+)-step-(\d+)-(\d+)\.parquet\Z")


class StepParts:
    """Collect step records and write them in parts.

    A part is written before the checkpoint that follows it, so a checkpoint's steps are always
    there. Those of a stretch that was given up for an earlier checkpoint stay, under its phase.

    Args:
        folder: Where the parts are.
        phase: The present phase, from 1.
    """

    def __init__(self, folder: Path, phase: int) -> None:
        self._folder = folder
        self._phase = phase
        self._records: list[StepRecord] = []

    def add(self, record: StepRecord) -> None:
        """Take in one attempted step."""
        self._records.append(record)

    def write(self) -> None:
        """Write what was collected, if anything.

        Raises:
            StoppedEarlyError: It could not be written; it is kept for the next attempt.
        """
        if not self._records:
            return
        first, last = self._records[0].step, self._records[-1].step
        name = f"phase-{self._phase}-step-{first:08d}-{last:08d}.parquet"
        write_records(self._folder / name, self._records)
        self._records.clear()

    def drop_after(self, step: int) -> None:
        """Remove the present phase's parts beyond a step: they are about to be made again."""
        for path, phase, _, last in _parts(self._folder):
            if phase == self._phase and last > step:
                path.unlink()


def read_parts(folder: Path, phase: int) -> list[StepRecord]:
    """Return the records of one phase, in the order of the steps.

    Args:
        folder: Folder `steps` of the run.
        phase: The phase, from 1.

    Raises:
        DamagedStepFileError: A part is damaged.
    """
    parts = sorted((first, path) for path, number, first, _ in _parts(folder) if number == phase)
    return [record for _, path in parts for record in read_steps(path)]


def _parts(folder: Path) -> Iterator[tuple[Path, int, int, int]]:
    for path in folder.glob("*.parquet"):
        found = _NAME.match(path.name)
        if found:
            phase, first, last = (int(number) for number in found.groups())
            yield path, phase, first, last
