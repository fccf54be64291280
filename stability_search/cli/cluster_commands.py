"""The commands of a study on a cluster that is elsewhere: `submit`, `logs`, `stop`, `fetch`."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stability_search.cli.emitting import (
    CpusOption,
    EmitOption,
    GpusOption,
    ImageOption,
    NodesOption,
    TimeLimitOption,
    Wishes,
    print_emitted,
    refuse_unclear,
)
from stability_search.cli.formats import Format
from stability_search.cli.lines import counted
from stability_search.cli.options import DryRunOption, SetOption, SpaceOption, Work
from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import print_data, short_path
from stability_search.errors import UsageError
from stability_search.inert import inert

if TYPE_CHECKING:
    from stability_search.cluster.address import ClusterAddress
    from stability_search.cluster.jobs import Job, Jobs
    from stability_search.cluster.parcel import Parcel
    from stability_search.cluster.submitting import Submission

_MIB, _KIB = 1024**2, 1024
_MAX_SHOWN = 20
_END_WORDS = {
    0: "there is a choice",
    2: "it could not be run",
    3: "no stable configuration",
    4: "machines failed",
    5: "the task failed",
    6: "out of disk or budget",
    130: "stopped",
    143: "stopped",
}
_RESUME = re.compile(r"`stability-search resume [^`]*`")  # of a directory on the cluster

UrlOption = Annotated[
    str,
    typer.Option(
        "--address", metavar="URL", help="The cluster's dashboard, e.g. http://localhost:8265."
    ),
]
_UrlUnlessEmitOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The cluster's dashboard, e.g. http://localhost:8265; needed without --emit.",
        show_default=False,
    ),
]
OfClusterOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="The dashboard of the cluster that RUN was submitted to.",
        show_default=False,
    ),
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Allow plain HTTP to another machine: all can be read on the way, a token too.",
    ),
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The study's name, as `submit` printed it.")
]
_NameOption = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="NAME",
        help="Its name on the cluster; default is made from its content.",
        show_default=False,
    ),
]
_NoWaitOption = Annotated[
    bool, typer.Option("--no-wait", help="Submit it and return; `logs --follow` follows it.")
]
_PythonOption = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="PROGRAM",
        help="The cluster's Python that has this tool; default python.",
        show_default=False,
    ),
]
_FolderOption = Annotated[
    str | None,
    typer.Option(
        "--remote-output",
        metavar="DIR",
        help="Folder of run directories there; default ~/.stability-search/runs.",
        show_default=False,
    ),
]
_MaxUploadOption = Annotated[
    float | None,
    typer.Option(
        "--max-upload-mib",
        metavar="MIB",
        help="Most that may be sent; default 50.",
        show_default=False,
    ),
]
_FetchOutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", metavar="DIR", help="Where to; default reports/NAME/.", show_default=False
    ),
]


def connect(address: "ClusterAddress") -> "Jobs":
    """Return a cluster's job interface, having heard from it.

    Args:
        address: Where it is.

    Raises:
        UsageError: It wants another token.
        InfrastructureError: It does not answer, or is no Ray.
    """
    from stability_search.cluster.connection import Connection
    from stability_search.cluster.jobs import RayJobs

    jobs = RayJobs(Connection(address))
    jobs.ray_version()
    return jobs


def _known(address: str, name: str, *, insecure: bool) -> tuple["Jobs", "Job"]:
    """Return a cluster, and the latest attempt of a study that must be there."""
    from stability_search.cluster.naming import checked_name
    from stability_search.cluster.submitting import known_attempt

    checked_name(name)
    jobs = connect(_address(address, insecure=insecure))
    return jobs, known_attempt(jobs, name)


def _address(text: str, *, insecure: bool) -> "ClusterAddress":
    from stability_search.cluster.address import read_address

    found = read_address(text, insecure=insecure, environment=os.environ, home=Path.home())
    if found.is_readable_on_the_way:
        _say(
            f"warning: {found.url} is plain HTTP to another machine: others on the way can read "
            "all of it, a token too. A tunnel (ssh -L) or https:// protects it."
        )
    return found


def submit(  # noqa: PLR0913 - one parameter per option
    *,
    space: SpaceOption,
    address: _UrlUnlessEmitOption = None,
    overrides: SetOption = None,
    name: _NameOption = None,
    no_wait: _NoWaitOption = False,
    dry_run: DryRunOption = False,
    insecure: InsecureOption = False,
    remote_output: _FolderOption = None,
    python: _PythonOption = None,
    max_upload_mib: _MaxUploadOption = None,
    emit: EmitOption = None,
    image: ImageOption = None,
    nodes: NodesOption = None,
    cpus_per_node: CpusOption = None,
    gpus_per_node: GpusOption = None,
    time_limit_s: TimeLimitOption = None,
) -> Work:
    """Run a study on a Ray cluster: send it, follow it, and end as `run` ends.

    What is sent is shown first: the space file, the task's file or package, and the modules that
    it imports from beside it or from here. A study that runs or has finished there is not run
    again; one that was stopped goes on. With --emit nothing is sent: a file for another scheduler
    is printed. Exit: as `run`; Ctrl-C leaves the study running.
    """

    def work() -> int:
        from stability_search import space as spaces
        from stability_search.cluster import submitting
        from stability_search.cluster.naming import checked_name, run_name
        from stability_search.cluster.parcel import MAX_MIB, make_parcel

        wishes = Wishes(
            image=image,
            nodes=nodes,
            cpus_per_node=cpus_per_node,
            gpus_per_node=gpus_per_node,
            time_limit_s=time_limit_s,
        )
        sending = {
            "--no-wait": no_wait,
            "--dry-run": dry_run,
            "--insecure": insecure,
            "--remote-output": remote_output is not None,
            "--python": python is not None,
            "--max-upload-mib": max_upload_mib is not None,
        }
        refuse_unclear(emit, address, sending, wishes, os.environ)
        loaded = spaces.load(space, overrides or ())
        if emit is not None:
            return print_emitted(emit, loaded, overrides, name, wishes)
        there = _address(address or "", insecure=insecure)
        place = submitting.Place(folder=_remote_folder(remote_output), python=python)
        most = MAX_MIB if max_upload_mib is None else max_upload_mib
        parcel = make_parcel(loaded, max_mib=most)
        chosen = run_name(loaded, parcel) if name is None else checked_name(name, "--name")
        _say(f"space file: {short_path(loaded.path)}")
        _say(*_parcel_lines(parcel, there.url))
        if dry_run:
            print_data(chosen)
            return 0
        jobs = connect(there)
        end = submitting.submit(jobs, chosen, parcel, place)
        _say(_found_line(end, jobs.url))
        if no_wait:
            print_data(end.name)
            return 0
        return _watch(jobs, end.name, end.attempt, is_over=end.found == "finished")

    return work


def logs(
    *,
    name: NameArgument,
    address: UrlOption,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on until the study ends, then as `submit`.")
    ] = False,
    insecure: InsecureOption = False,
) -> Work:
    """Print what the latest attempt of a submitted study has printed."""

    def work() -> int:
        jobs, job = _known(address, name, insecure=insecure)
        if follow:
            return _watch(jobs, name, job.id, is_over=False)
        print_data(*(inert(line.expandtabs(1)) for line in jobs.log(job.id).splitlines()))
        return 0

    return work


def stop(*, name: NameArgument, address: UrlOption, insecure: InsecureOption = False) -> Work:
    """Stop a submitted study: every finished trial is kept, and submit goes on with it."""

    def work() -> int:
        from stability_search.cluster import stopping

        jobs, job = _known(address, name, insecure=insecure)
        if job.state.is_over:
            _say(f"{name}: it had ended before: {_state_words(jobs, job)}")
            return 0
        if job.node_id:
            _say(f"{name}: stopping; it writes what it has")
        job = stopping.stop(jobs, job)
        if not job.state.is_over:
            _say(f"{name}: it waits for a free CPU, and will end as soon as it gets one")
            return 0
        _say(f"{name}: {job.state.value.lower()}. Submit it again to go on.")
        return 0

    return work


def fetch(
    *,
    name: NameArgument,
    address: UrlOption,
    output: _FetchOutputOption = None,
    insecure: InsecureOption = False,
) -> Work:
    """Bring the run directory of a submitted study home, checked by hash; it may be running.

    What is there already and right is not read again.
    """

    def work() -> int:
        from stability_search.cluster import fetching
        from stability_search.space_directory import DEFAULT_PARENT

        jobs, _ = _known(address, name, insecure=insecure)
        done = fetching.fetch(jobs, name, output or DEFAULT_PARENT / name)
        mib = done.num_bytes / _MIB
        speed = f", {mib / done.seconds:.1f} MiB/s" if done.seconds > 0 and mib >= 1 else ""
        _say(
            f"{done.num_new} of {done.num_files} files read ({mib:.1f} MiB in "
            f"{done.seconds:.1f} s{speed}), the others were there; all match their hash"
        )
        where = short_path(done.directory)
        print_data(inert(where))
        _say(
            f"next: stability-search report {shlex.quote(where)}  # its pages name paths of the "
            "cluster until then"
        )
        if (done.directory / "best.yaml").is_file():
            best = shlex.quote(f"{where}/best.yaml")
            _say(f"next: stability-search train --space {best} --steps 10000  # your own length")
        return 0

    return work


def remote_status(name: str, address: str, chosen: Format, *, insecure: bool) -> int:
    """Print the status of a submitted study; its exit code is 0.

    Args:
        name: The study's name.
        address: The cluster's dashboard.
        chosen: How it is printed.
        insecure: True allows plain HTTP to another machine.
    """
    from stability_search.cluster import looking

    jobs, job = _known(address, name, insecure=insecure)
    if chosen is Format.TABLE:
        print_data(inert(f"{name} on {jobs.url}: attempt {job.id}, {_state_words(jobs, job)}"))
        if not (job.node_id or job.state.is_over):
            print_data(f"next: {_logs_command(jobs, name)}")
            return 0
    lines = looking.remote_status(jobs, name, chosen.value).splitlines()
    if chosen is Format.TABLE:
        print_data(*_lines_from_afar(lines), f"next: {_fetch_command(jobs, name)}")
    else:
        print_data(*(inert(line) for line in lines))
    return 0


def _watch(jobs: "Jobs", name: str, attempt: str, *, is_over: bool) -> int:
    """Follow an attempt to its end, print the verdict and return its exit code."""
    from stability_search.cluster.endings import result_of
    from stability_search.cluster.following import follow

    try:
        if not is_over:
            follow(jobs, attempt, _say, say=_say)
        job = jobs.find(attempt)
        if job is None:
            raise UsageError(f"{attempt}: {jobs.url} does not know it any more.")
        result = result_of(jobs, job)
    except KeyboardInterrupt:
        _say(f"{name} goes on without us. Come back with `{_logs_command(jobs, name)}`.")
        raise
    print_data(*_lines_from_afar(result.lines))
    print_data(inert(f"files: {result.run_directory} on node {job.node_id[:8]} of {jobs.url}"))
    print_data(f"next: {_fetch_command(jobs, name)}")
    return result.exit_code


def _lines_from_afar(lines: Sequence[str]) -> list[str]:
    """Return what was printed on the cluster without the commands and paths that hold there."""
    kept = [line for line in lines if not line.startswith(("report: ", "next: "))]
    return [
        inert(_RESUME.sub("`stability-search submit` with the same words", line)) for line in kept
    ]


def _fetch_command(jobs: "Jobs", name: str) -> str:
    return f"stability-search fetch {name} --address {shlex.quote(jobs.url)}"  # checked, both


def _logs_command(jobs: "Jobs", name: str) -> str:
    return f"stability-search logs {name} --address {shlex.quote(jobs.url)} --follow"


def _state_words(jobs: "Jobs", job: "Job") -> str:
    """Say how an attempt is, or how it ended: by its own record, not by Ray's word for it."""
    from stability_search.cluster.endings import read_result

    if not job.state.is_over:
        return job.state.value.lower() if job.node_id else "waits for a free CPU"
    result = read_result(jobs, job)
    if result is None:
        return "stopped" if job.state.value == "STOPPED" else "no record of how it ended"
    words = "nothing was run" if result.problem else _END_WORDS.get(result.exit_code, "failed")
    return f"exit {result.exit_code}, {words}"


def _found_line(end: "Submission", url: str) -> str:
    match end.found.value:
        case "started":
            return f"{end.name}: submitted to {url}"
        case "resumed":
            return f"{end.name}: it goes on as {end.attempt} where its last attempt ended"
        case "running":
            return f"{end.name}: it runs there already as {end.attempt}; nothing was submitted"
        case _:
            return f"{end.name}: it has finished there as {end.attempt}; nothing was submitted"


def _remote_folder(text: str | None) -> str:
    from stability_search.cluster.submitting import RUNS_FOLDER

    folder = text or RUNS_FOLDER
    if not folder.startswith(("/", "~")):
        raise UsageError(
            f"--remote-output: a folder that begins with / or ~ is needed, but got {folder!r}: "
            "the folder in which a job runs is removed with it."
        )
    return folder


def _parcel_lines(parcel: "Parcel", url: str) -> Sequence[str]:
    size = _size(parcel.num_bytes)
    lines = [f"to be sent to {url}: {counted(len(parcel.files), 'file')}, {size}"]
    shown = sorted(parcel.files.items())[:_MAX_SHOWN]
    lines += [f"    {_size(len(content)):>9}  {path}" for path, content in shown]
    rest = len(parcel.files) - len(shown)
    if rest:
        lines.append(f"    and {rest} more")
    return [*lines, *(f"note: {note}" for note in parcel.notes)]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.1f} MiB" if num_bytes >= _MIB else f"{num_bytes / _KIB:.1f} KiB"


def _say(*lines: str) -> None:
    message_sink().write(*(inert(line.expandtabs(1)) for line in lines))
