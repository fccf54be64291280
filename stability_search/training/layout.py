"""The files of one long training: their names stand here and nowhere else."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainDirectory:
    """Where the files of one long training are.

    Attributes:
        path: The directory.
    """

    path: Path

    @property
    def state(self) -> Path:
        """Phases, epochs and how it ended, for programs; the truth about the run."""
        return self.path / "train.json"

    @property
    def log(self) -> Path:
        """Every line that was printed, with its time."""
        return self.path / "train.log"

    @property
    def curves(self) -> Path:
        """The picture of the curves."""
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def steps(self) -> Path:
        """Folder of the step records."""
        return self.path / "steps"

    @property
    def scalars(self) -> Path:
        """Folder that TensorBoard is pointed at."""
        return self.path / "tensorboard"

    def space(self, phase: int) -> Path:
        """Return the space file that a phase was trained with.

        Args:
            phase: Its number, from 1.
        """
        return self.path / ("space.yaml" if phase == 1 else f"space-{phase}.yaml")
