"""In a job, on the cluster: run the study, or go on with it, and record how that ended.

    python -m stability_search.cluster.attempt ORDER

The study itself is the ordinary command in a process of its own, so whatever becomes of it, a
record says so. Ray asks every process of a job to end by SIGTERM; this one hands it on, for the
study's may be younger than Ray's list of them, and outlives it. Killed, it takes the study along,
which nobody could stop any more.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from stability_search import __version__
from stability_search import space as spaces
from stability_search.cluster.parcel import SPACE_FILE
from stability_search.cluster.result import EXIT_CODES, AttemptResult, own_log_folder, record_name
from stability_search.errors import InfrastructureError, StabilitySearchError, UsageError
from stability_search.files import write_whole
from stability_search.inert import inert
from stability_search.interruption import end_with_parent
from stability_search.search.scratch import Scratch
from stability_search.space import Space, changed_values, resume_difference
from stability_search.space_directory import refuse_changed_task, task_facts

STOP_WAIT_S = 60  # Ray kills what is left of a stopped job after so long; it waits 3 s if not told
_REPORT_S = 40.0  # within it, once the study itself has ended
_TERMINATED = 143
_ANOTHER_NAME = "Submit this one under another --name."


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptOrder:
    """What an attempt is told.

    Attributes:
        attempt: Its submission id.
        name: The study's name, which is also that of its run directory.
        folder: Where run directories are; `~` is the home of whoever runs Ray there.
        version: Of stability-search where it was submitted.
    """

    attempt: str
    name: str
    folder: str
    version: str

    def to_text(self) -> str:
        """Return it as one word of a command line, before quoting."""
        return json.dumps(asdict(self))


class StopRequest:
    """A SIGTERM, which may come before there is a study to end."""

    def __init__(self) -> None:
        self.is_there = False
        self._study: subprocess.Popen[bytes] | None = None

    def receive(self, *_: object) -> None:
        """Note the signal, and hand it on; a study that had it already takes no harm."""
        self.is_there = True
        if self._study is not None:
            self._study.terminate()

    def reach(self, study: "subprocess.Popen[bytes]") -> None:
        """Say whom it is for; what came while the process was made is handed on now."""
        self._study = study
        if self.is_there:
            study.terminate()


def run_attempt(
    order: AttemptOrder, *, address: str, stop: StopRequest | None = None
) -> AttemptResult:
    """Run a study with what was sent, or go on with it where its run directory is there.

    Args:
        order: Which.
        address: Of the Ray that runs this job.
        stop: Ends the study, also before it begins.
    """
    stop = stop or StopRequest()
    directory = Path(order.folder).expanduser() / order.name
    try:
        _refuse_other_version(order.version)
        words = _words(directory, Path(SPACE_FILE))
    except StabilitySearchError as error:
        return AttemptResult(exit_code=error.exit_code, problem=str(error))
    # Two nodes of one machine share Ray's folder, and the second unpacks what was sent anew.
    with contextlib.closing(Scratch()) as scratch:
        sent = shutil.copytree(Path.cwd(), scratch.path / "sent")
        if stop.is_there:
            never = ("Stopped before it began.",)
            return AttemptResult(exit_code=_TERMINATED, lines=never, run_directory=str(directory))
        exit_code, lines = _run([*words, "--address", address], folder=sent, on_start=stop.reach)
        if exit_code == _TERMINATED:
            _, lines = _run(["report", str(directory)], folder=sent, timeout_s=_REPORT_S)
    return AttemptResult(exit_code=exit_code, lines=lines, run_directory=str(directory))


def _refuse_other_version(wanted: str) -> None:
    if wanted != __version__:
        raise InfrastructureError(
            f"stability-search: {wanted} was submitted, but the cluster has {__version__}.",
            hint="Install the same version on both.",
        )


def _words(directory: Path, space_file: Path) -> list[str]:
    """Return the command: `run`, or `resume` with what has changed since.

    Raises:
        UsageError: It is another study that was given the same name.
    """
    if not (directory / SPACE_FILE).is_file():
        return ["run", "--space", str(space_file), "--output", str(directory)]
    old, new = spaces.load(directory / SPACE_FILE), spaces.load(space_file)
    differences = resume_difference(old, new)
    if differences:
        raise UsageError(
            f"{directory.name}: a study of that name is there, but: {' '.join(differences)}",
            hint=_ANOTHER_NAME,
        )
    _refuse_other_task(directory, new)
    changed = {key: now for key, (_, now) in changed_values(old, new).items()}
    options = [f"--set={key}={json.dumps(now)}" for key, now in changed.items()]
    return ["resume", str(directory), *options]


def _refuse_other_task(directory: Path, sent: Space) -> None:
    """Compare what was sent with what the run directory runs, where a restarted head cannot."""
    try:
        refuse_changed_task(directory, task_facts(sent))
    except UsageError as error:
        raise UsageError(
            f"{directory.name}: a study of that name is there, but: {error.message}",
            hint=_ANOTHER_NAME,
        ) from error


def _run(
    words: Sequence[str],
    *,
    folder: Path,
    timeout_s: float | None = None,
    on_start: Callable[["subprocess.Popen[bytes]"], None] | None = None,
) -> tuple[int, tuple[str, ...]]:
    """Run a command of ours in a folder; return its exit code and its standard output."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "stability_search", *words],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            preexec_fn=partial(end_with_parent, os.getpid()),  # noqa: PLW1509 - there is one thread
        )
        if on_start is not None:
            on_start(process)
        try:
            exit_code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            exit_code = process.wait()
        output.seek(0)
        lines = tuple(output.read().decode(errors="replace").splitlines())
    if exit_code == -signal.SIGTERM:  # before it could take the signal
        exit_code = _TERMINATED
    elif exit_code not in EXIT_CODES:  # killed, or its Python failed: nobody said why
        exit_code = InfrastructureError.exit_code
    return exit_code, lines


def main(words: Sequence[str]) -> int:
    """Run the attempt and leave its record.

    Args:
        words: An order, as `AttemptOrder.to_text` returned it.
    """
    order = AttemptOrder(**json.loads(words[0]))
    record = own_log_folder() / record_name(order.attempt)
    record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    stop = StopRequest()
    signal.signal(signal.SIGTERM, stop.receive)
    result = run_attempt(order, address=os.environ["RAY_ADDRESS"], stop=stop)
    write_whole(record, result.to_text())
    if result.problem:
        shown = inert(result.problem, keeps="\n")
        sys.stderr.write(f"{shown}\n")
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
