"""A scheduler that is not there: programs by Slurm's names that start tasks on this machine."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# As the real one: options, then a command; one task a node, each told which it is.
_SRUN = """\
#!/bin/bash
printf '%s\\0' "$@" >"$STAND_IN/srun-words"
while [[ $1 == --* ]]; do shift; done
tasks=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  SLURM_NODEID=$node "$@" &
  tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
  wait "$task" || worst=$?
done
exit "$worst"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class StandInSlurm:
    """A folder of programs, and what they leave behind.

    Attributes:
        folder: Where they are and what they write.
        path: Where other programs are looked for.
    """

    folder: Path
    path: str

    def install(self, name: str, text: str) -> None:
        """Put a program there."""
        program = self.folder / name
        program.write_text(text)
        program.chmod(0o755)

    def environment(self, *, nodes: int, cpus: int, **more: str) -> dict[str, str]:
        """Return what a job finds in its environment."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        return {
            **kept,
            "PATH": f"{self.folder}:{self.path}",
            "TMPDIR": str(self.folder),
            "STAND_IN": str(self.folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_CPUS_PER_TASK": str(cpus),
            **more,
        }

    def sbatch(
        self,
        script: Path,
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """Start a batch script on the first node, in a session of its own."""
        bash = shutil.which("bash")
        assert bash is not None
        return subprocess.Popen(  # noqa: S603 - our own script
            [*prefix, bash, str(script)],
            env=dict(environment),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def words(self, name: str) -> list[str]:
        """Return the arguments that a program was last called with."""
        return (self.folder / name).read_bytes().decode().split("\0")[:-1]


def stand_in_slurm(folder: Path, *, path: str = os.defpath) -> StandInSlurm:
    """Make the folder, with `srun` in it."""
    folder.mkdir()
    slurm = StandInSlurm(folder=folder, path=path)
    slurm.install("srun", _SRUN)
    return slurm
