"""The batch script with the real Ray and a real study, on one node in a machine of its own.

`ray symmetric-run` wants a node without any other Ray, and ends every Ray that it finds: so it
runs where it sees no process and no port but its own, and where all of them end with it.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import stability_search
from stability_search import read_run
from stability_search.cluster.emit_plan import EmitPlan
from stability_search.cluster.slurm import render_sbatch
from tests.cluster.stand_in_slurm import StandInSlurm, stand_in_slurm
from tests.search.inline_study import write_space

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SPACE = """\
name: batch
task: {task}:Tiny
task_args: {{batch_s: 0.03}}
trial: {{steps: 20, timeout_s: 60}}
fixed: {{batch_size: 8}}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
search: {{trials: 2, sampler: random}}
confirm: {{top: 1, seeds: 1, steps: 20, octaves: 0, min_margin: 0}}
"""
ALONE = ("unshare", "--user", "--map-root-user", "--pid", "--net", "--fork", "--mount-proc")


@pytest.fixture
def slurm(tmp_path: Path) -> StandInSlurm:
    """Return a scheduler whose only node is a namespace of this machine."""
    tools = [shutil.which(name) for name in ("unshare", "ip")]
    if None in tools or subprocess.run([*ALONE, "true"], check=False).returncode:  # noqa: S603
        pytest.skip("needs unshare, ip, and the right to make namespaces")
    folders = {str(Path(tool).parent) for tool in tools if tool is not None}
    binaries = Path(sys.executable).parent
    slurm = stand_in_slurm(
        tmp_path / "slurm", path=os.pathsep.join([str(binaries), *sorted(folders), os.defpath])
    )
    slurm.install("with-loopback", '#!/bin/sh\nip link set lo up\nexec "$@"\n')
    return slurm


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """Return a folder whose name is short: sockets below it may have 107 characters."""
    with tempfile.TemporaryDirectory(prefix="r") as folder:
        yield folder


def start(slurm: StandInSlurm, script: Path, ray_folder: str) -> subprocess.Popen[str]:
    environment = slurm.environment(
        nodes=1,
        cpus=2,
        RAY_TMPDIR=ray_folder,
        OMP_NUM_THREADS="1",
        PYTHONPATH=str(Path(stability_search.__file__).parents[1]),
    )
    alone = [*ALONE, "--kill-child", str(slurm.folder / "with-loopback")]
    return slurm.sbatch(script, environment, prefix=alone)


def inner_pid(process: subprocess.Popen[str]) -> int:
    """Return the process id of the script itself: `unshare` passes no signal on."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return int(children.split()[0])


def test_a_study_that_the_time_limit_ended_goes_on_when_it_is_submitted_again(
    slurm: StandInSlurm, tmp_path: Path, ray_folder: str
) -> None:
    space = write_space(tmp_path, text=SPACE)
    output = tmp_path / "reports" / "batch"
    script = slurm.folder / "batch.sh"
    script.write_text(
        render_sbatch(
            EmitPlan(
                study="batch",
                folder=str(tmp_path),
                space=space.name,
                output=str(output),
                version=stability_search.__version__,
                ray_version="2.60.0",
            )
        )
    )
    with start(slurm, script, ray_folder) as first:
        assert first.stdout is not None
        printed = []
        for line in first.stdout:
            printed.append(line)
            if re.search(r"pilot-00 \w+, q", line):
                os.kill(inner_pid(first), signal.SIGTERM)
        assert first.wait() == 143, "".join(printed)
    with start(slurm, script, ray_folder) as second:
        rest, _ = second.communicate()
        assert second.returncode == 0, rest
    assert re.search(r"pilot-00 \w+, q", rest) is None  # it was kept
    trials = read_run(output).trials
    assert len(trials) == len(set(trials["trial_id"]))
    assert {"pilot", "search", "confirm"} == set(trials["stage"])
