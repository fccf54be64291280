"""The batch script, checked by shellcheck and run by a scheduler that is not there."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stability_search.cluster.emit_plan import EmitPlan
from stability_search.cluster.slurm import render_sbatch
from stability_search.errors import UsageError
from tests.cluster.stand_in_slurm import StandInSlurm, stand_in_slurm
from tests.hostile_strings import HOSTILE_STRINGS

# Ray as far as the script sees it: the head runs the command, every other node ends badly.
RAY = """\
#!/bin/bash
printf '%s\\0' "$@" >"$STAND_IN/ray-$SLURM_NODEID"
env >"$STAND_IN/environment-$SLURM_NODEID"
[ "$RAY_STARTS" = yes ] || exit 0
[ "$SLURM_NODEID" = 0 ] || exit 1
while [ "$1" != -- ]; do shift; done
shift
"$@"
"""

STUDY = """\
#!/bin/bash
printf '%s\\0' "$@" >"$STAND_IN/study-words"
pwd >"$STAND_IN/study-folder"
if [ "$1" = run ]; then
  while [ "$1" != --output ]; do shift; done
  mkdir -p "$2" && touch "$2/space.yaml"
fi
[ "$STUDY_ENDS" != killed ] || kill -KILL "$PPID"
exit "$STUDY_ENDS"
"""

WAITING_STUDY = f"""\
#!{sys.executable}
import os, signal, sys

signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
with open(os.environ["STAND_IN"] + "/started", "w"):  # a pipe: somebody waits at its other end
    pass
signal.sigwait({{signal.SIGTERM}})
sys.exit(143)
"""

PLAN = EmitPlan(
    study="teacher",
    folder="/home/me/spaces",
    space="teacher.yaml",
    output="/home/me/reports/teacher",
    version="0.1.0",
    ray_version="2.60.0",
)


@pytest.fixture
def slurm(tmp_path: Path) -> StandInSlurm:
    slurm = stand_in_slurm(tmp_path / "slurm")
    slurm.install("ray", RAY)
    slurm.install("stability-search", STUDY)
    return slurm


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    code: int
    output: str


@contextlib.contextmanager
def started(
    slurm: StandInSlurm, script: str, *, nodes: int = 1, ends: str = "0", ray: str = "yes"
) -> Iterator[subprocess.Popen[str]]:
    path = slurm.folder / "script.sh"
    path.write_text(script)
    environment = slurm.environment(nodes=nodes, cpus=4, STUDY_ENDS=ends, RAY_STARTS=ray)
    process = slurm.sbatch(path, environment)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def run(
    slurm: StandInSlurm, script: str, *, nodes: int = 1, ends: str = "0", ray: str = "yes"
) -> Ended:
    with started(slurm, script, nodes=nodes, ends=ends, ray=ray) as process:
        output, _ = process.communicate()
        return Ended(code=process.returncode, output=output)


def here(tmp_path: Path, **changes: object) -> EmitPlan:
    return dataclasses.replace(PLAN, output=str(tmp_path / "reports" / "teacher"), **changes)


def lines(plan: EmitPlan) -> list[str]:
    return render_sbatch(plan).splitlines()


def test_the_script_asks_for_what_the_plan_says() -> None:
    plan = dataclasses.replace(
        PLAN, nodes=12, cpus_per_node=16, gpus_per_node=8, time_limit_s=93_784
    )
    asked = {line for line in lines(plan) if line.startswith("#SBATCH")}
    assert asked >= {
        "#SBATCH --job-name=teacher",
        "#SBATCH --nodes=12",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1-02:03:04",
        "#SBATCH --exclusive",
        "#SBATCH --signal=B:TERM@120",
    }


def test_without_gpus_and_time_limit_none_is_asked_for() -> None:
    text = render_sbatch(PLAN)
    assert "--gpus-per-node" not in text
    assert "--time" not in text


def test_a_time_limit_leaves_room_for_the_warning() -> None:
    with pytest.raises(UsageError, match="--time-limit-s: at least 300 is needed for slurm"):
        render_sbatch(dataclasses.replace(PLAN, time_limit_s=299))
    assert "#SBATCH --time=0-00:05:00" in lines(dataclasses.replace(PLAN, time_limit_s=300))


def test_a_job_directive_holds_no_text_of_the_users() -> None:
    """Slurm reads directives up to the first command; no name can begin a line before it."""
    for name in HOSTILE_STRINGS:
        if not is_possible(name):
            continue
        plan = dataclasses.replace(PLAN, study=name, folder=f"/{name}")
        head, _, rest = render_sbatch(plan).partition("\nset -euo pipefail\n")
        assert rest
        for line in head.splitlines():
            assert re.fullmatch(r"[#A-Za-z0-9 .,;:!/`'=@_-]*", line), line


def is_possible(text: str) -> bool:
    """Say whether a text can be an argument of a program."""
    return "\0" not in text and not re.search("[\ud800-\udfff]", text)


def hostile_plan(tmp_path: Path) -> EmitPlan:
    overrides = [text for text in HOSTILE_STRINGS if is_possible(text)]
    return dataclasses.replace(
        PLAN,
        study="\n#SBATCH --uid=0\n$(touch planted)",
        folder=str(tmp_path / 'it\'s "a" $(touch planted) `touch planted` folder'),
        space="*; touch planted.yaml",
        output=str(tmp_path / "reports\n$(touch planted)"),
        overrides=tuple(overrides),
    )


def shellcheck(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("shellcheck")  # it comes with the `dev` extra
    return subprocess.run(  # noqa: S603 - our own script
        [str(program), "--norc", str(path)], capture_output=True, text=True, check=False
    )


def test_shellcheck_has_nothing_to_say_whatever_the_names_are(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(render_sbatch(hostile_plan(tmp_path)))
    found = shellcheck(script)
    assert (found.returncode, found.stdout) == (0, "")
    script.write_text(render_sbatch(PLAN).replace('-TERM "$step"', "-TERM $step"))
    assert "SC2086" in shellcheck(script).stdout  # it does look


def test_hostile_names_arrive_as_they_are(slurm: StandInSlurm, tmp_path: Path) -> None:
    plan = hostile_plan(tmp_path)
    assert run(slurm, render_sbatch(plan)).code == 0
    run_, space, path, *words = slurm.words("study-words")
    *overrides, output, directory, address, _ = words
    assert (run_, space, path) == ("run", "--space", f"{plan.folder}/{plan.space}")
    assert (output, directory, address) == ("--output", plan.output, "--address")
    assert tuple(overrides[1::2]) == plan.overrides
    assert set(overrides[::2]) == {"--set"}
    assert not list(tmp_path.rglob("planted*"))


def test_the_study_runs_where_the_command_was_called(slurm: StandInSlurm, tmp_path: Path) -> None:
    folder = tmp_path / "a 'project' $HOME"
    folder.mkdir()
    assert run(slurm, render_sbatch(here(tmp_path, called_from=str(folder)))).code == 0
    assert (slurm.folder / "study-folder").read_text() == f"{folder}\n"


def test_on_one_node_ray_has_no_dashboard(slurm: StandInSlurm, tmp_path: Path) -> None:
    assert run(slurm, render_sbatch(here(tmp_path))).code == 0
    words = slurm.words("ray-0")
    assert words[:5] == ["symmetric-run", "--address", "127.0.0.1:24711", "--min-nodes", "1"]
    assert words[5:9] == ["--num-cpus=3", "--num-gpus=0", "--include-dashboard=false", "--"]
    assert slurm.words("study-words")[-2:] == ["--address", "127.0.0.1:24711"]


def test_on_several_nodes_the_head_alone_keeps_a_core_and_has_no_dashboard(
    slurm: StandInSlurm, tmp_path: Path
) -> None:
    slurm.install("hostname", "#!/bin/sh\necho '10.1.2.3 172.17.0.1 '\n")
    assert run(slurm, render_sbatch(here(tmp_path)), nodes=3).code == 0
    for node in range(3):
        words = slurm.words(f"ray-{node}")
        assert words[:5] == ["symmetric-run", "--address", "10.1.2.3:24711", "--min-nodes", "3"]
        assert ("--include-dashboard=false" in words) == (node == 0)  # the others refuse it
        assert f"--num-cpus={3 if node == 0 else 4}" in words
    assert "--no-kill" in slurm.words("srun-words")
    assert "--kill-on-bad-exit=0" in slurm.words("srun-words")  # a node that is lost is no end


def test_ray_wants_a_token_that_is_nobody_elses_and_stands_in_no_argument(
    slurm: StandInSlurm, tmp_path: Path
) -> None:
    tokens = set()
    for _ in range(2):
        assert run(slurm, render_sbatch(here(tmp_path))).code == 0
        environment = (slurm.folder / "environment-0").read_text().splitlines()
        assert "RAY_AUTH_MODE=token" in environment
        (token,) = (
            line.removeprefix("RAY_AUTH_TOKEN=")
            for line in environment
            if line.startswith("RAY_AUTH_TOKEN=")
        )
        assert re.fullmatch("[0-9a-f]{64}", token)
        tokens.add(token)
        (slurm.folder / "environment-0").unlink()
        for path in tmp_path.rglob("*"):
            assert not path.is_file() or token.encode() not in path.read_bytes()
    assert len(tokens) == 2


def test_the_same_script_begins_a_study_and_then_goes_on_with_it(
    slurm: StandInSlurm, tmp_path: Path
) -> None:
    plan = here(tmp_path, overrides=("trial.steps=50",))
    script = render_sbatch(plan)
    assert run(slurm, script, ends="143").code == 143
    assert slurm.words("study-words")[:5] == [
        *("run", "--space", "/home/me/spaces/teacher.yaml", "--set", "trial.steps=50")
    ]
    assert run(slurm, script).code == 0
    assert slurm.words("study-words")[:3] == ["resume", plan.output, "--address"]


@pytest.mark.parametrize("code", ["0", "3", "6"])
def test_the_exit_code_is_the_studys_whatever_other_nodes_say(
    slurm: StandInSlurm, tmp_path: Path, code: str
) -> None:
    ended = run(slurm, render_sbatch(here(tmp_path)), nodes=2, ends=code)
    assert ended.code == int(code)
    assert ("goes on where" in ended.output) == (code not in {"0", "3"})


def test_a_ray_that_does_not_start_is_a_failure_though_it_ends_with_0(
    slurm: StandInSlurm, tmp_path: Path
) -> None:
    ended = run(slurm, render_sbatch(here(tmp_path)), ray="no")
    assert ended.code == 4
    assert "the study did not run: Ray did not start on 1 nodes" in ended.output


def test_a_study_that_is_killed_says_so(slurm: StandInSlurm, tmp_path: Path) -> None:
    ended = run(slurm, render_sbatch(here(tmp_path)), ends="killed")
    assert ended.code == 4
    assert "the study was killed" in ended.output


def test_a_program_that_is_missing_is_named(slurm: StandInSlurm, tmp_path: Path) -> None:
    (slurm.folder / "stability-search").unlink()
    ended = run(slurm, render_sbatch(here(tmp_path)))
    assert ended.code == 2
    assert "stability-search: not found" in ended.output


def terminated(slurm: StandInSlurm, script: str) -> int:
    """Run a script, signal it alone once its study has started, and return how it ended."""
    slurm.install("stability-search", WAITING_STUDY)
    os.mkfifo(slurm.folder / "started")
    with started(slurm, script) as process:
        (slurm.folder / "started").read_text()
        process.send_signal(signal.SIGTERM)
        return process.wait()


def test_the_warning_before_the_time_limit_reaches_the_study(
    slurm: StandInSlurm, tmp_path: Path
) -> None:
    assert terminated(slurm, render_sbatch(here(tmp_path))) == 143
    assert not list(slurm.folder.glob("tmp.*"))  # nothing is left behind


def test_a_script_that_takes_no_signal_leaves_its_study(
    slurm: StandInSlurm, tmp_path: Path
) -> None:
    deaf = render_sbatch(here(tmp_path)).replace("trap stop TERM\n", "")
    assert terminated(slurm, deaf) == -signal.SIGTERM  # the twin of the test above
