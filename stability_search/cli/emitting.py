"""`submit --emit`: a file for a scheduler that starts a Ray of its own, on standard output."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stability_search import __version__
from stability_search.cli.outlets import message_sink
from stability_search.cli.printing import print_data, short_path
from stability_search.errors import UsageError
from stability_search.inert import inert

if TYPE_CHECKING:
    from stability_search.cluster.emit_plan import EmitPlan
    from stability_search.space import Space

_RAYS_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Scheduler(StrEnum):
    """For whom a file is written."""

    KUBERAY = "kuberay"
    SLURM = "slurm"


EmitOption = Annotated[
    Scheduler | None,
    typer.Option(
        "--emit",
        help="Print a RayJob manifest or an sbatch script instead, and send nothing.",
        show_default=False,
    ),
]
ImageOption = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="IMAGE",
        help="With --emit kuberay: the container image, which holds this tool and Ray.",
        show_default=False,
    ),
]
NodesOption = Annotated[
    int | None,
    typer.Option(
        "--nodes",
        metavar="N",
        help="With --emit: nodes that run trials; default 1.",
        show_default=False,
    ),
]
CpusOption = Annotated[
    int | None,
    typer.Option(
        "--cpus-per-node",
        metavar="N",
        help="With --emit: CPU cores of each; default 8.",
        show_default=False,
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-node",
        metavar="N",
        help="With --emit: GPUs of each; default 0.",
        show_default=False,
    ),
]
TimeLimitOption = Annotated[
    int | None,
    typer.Option(
        "--time-limit-s",
        metavar="S",
        help="With --emit: the scheduler ends it after so long; default is its own limit.",
        show_default=False,
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Wishes:
    """What was asked of a scheduler; None where nothing was.

    Attributes:
        image: Container image.
        nodes: Nodes that run trials.
        cpus_per_node: CPU cores of each.
        gpus_per_node: GPUs of each.
        time_limit_s: Seconds after which the scheduler ends it.
    """

    image: str | None = None
    nodes: int | None = None
    cpus_per_node: int | None = None
    gpus_per_node: int | None = None
    time_limit_s: int | None = None

    def given(self) -> dict[str, str | int]:
        """Return those that were asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def refuse_unclear(
    scheduler: Scheduler | None,
    address: str | None,
    sending: Mapping[str, bool],
    wishes: Wishes,
    environment: Mapping[str, str],
) -> None:
    """Refuse options that cannot be honoured together, all at once.

    Args:
        scheduler: For whom a file is written; None for a cluster that is there.
        address: Of that cluster.
        sending: Whether each option was given that says how a study is sent there.
        wishes: What was asked of a scheduler.
        environment: Variables that Ray's own commands read; only named.

    Raises:
        UsageError: Something cannot be honoured.
    """
    problems, hint = [], ""
    asked = [f"--{name.replace('_', '-')}" for name in wishes.given()]
    sent = [
        name
        for name, is_given in {"--address": address is not None, **sending}.items()
        if is_given
    ]
    if scheduler is None and address is None:
        problems.append("--address, --emit: one of them is needed, but got none.")
        hint = "A cluster's dashboard is named like http://localhost:8265."
        named = [name for name in _RAYS_ADDRESSES if environment.get(name)]
        if named:
            verb = "are" if len(named) > 1 else "is"
            hint += f" {' and '.join(named)} {verb} not read: where things go is said each time."
    if scheduler is None and asked:
        problems.append(f"{', '.join(asked)}: taken with --emit only.")
        hint = hint or "What one trial occupies stands in the space file, in search.resources."
    if scheduler is not None and sent:
        problems.append(f"{', '.join(sent)}: not taken with --emit, which sends nothing.")
    if scheduler is Scheduler.SLURM and wishes.image is not None:
        problems.append("--image: taken with --emit kuberay only.")
    if problems:
        raise UsageError(" ".join(problems), hint=hint)


def print_emitted(
    scheduler: Scheduler,
    space: "Space",
    overrides: Sequence[str] | None,
    name: str | None,
    wishes: Wishes,
) -> int:
    """Print the file, and what to do with it; nothing is sent.

    Args:
        scheduler: For whom.
        space: The study's space, with `--set` applied.
        overrides: `--set` as given.
        name: The study's name there; None for that which `submit` would give it.
        wishes: What is asked of the scheduler.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: What was asked for cannot be honoured.
    """
    if scheduler is Scheduler.KUBERAY:
        from stability_search.cluster.kuberay import render_rayjob

        plan = _rayjob_plan(space, name, wishes)
        text, command = render_rayjob(plan), "kubectl apply -f FILE"
    else:
        from stability_search.cluster.slurm import render_sbatch

        plan = _sbatch_plan(space, overrides or (), name, wishes)
        text, command = render_sbatch(plan), "sbatch FILE"
    message_sink().write(
        inert(f"space file: {short_path(space.path)}"),
        f"next: keep standard output as FILE, read it, then `{command}`",
    )
    print_data(text.removesuffix("\n"))
    return 0


def _rayjob_plan(space: "Space", name: str | None, wishes: Wishes) -> "EmitPlan":
    from importlib.metadata import version

    from stability_search.cluster.emit_plan import EmitPlan, InputFile
    from stability_search.cluster.naming import checked_name, run_name
    from stability_search.cluster.parcel import SPACE_FILE, make_parcel

    parcel = make_parcel(space)
    message_sink().write(*(inert(f"note: {note}") for note in parcel.notes))
    return EmitPlan(
        study=run_name(space, parcel) if name is None else checked_name(name, "--name"),
        folder="",
        space=SPACE_FILE,
        output="",
        files=tuple(InputFile(path=path, content=data) for path, data in parcel.files.items()),
        version=__version__,
        ray_version=version("ray"),
        **wishes.given(),  # type: ignore[arg-type]
    )


def _sbatch_plan(
    space: "Space", overrides: Sequence[str], name: str | None, wishes: Wishes
) -> "EmitPlan":
    from importlib.metadata import version

    from stability_search.cluster.emit_plan import EmitPlan
    from stability_search.cluster.naming import checked_name, run_name
    from stability_search.cluster.parcel import Parcel
    from stability_search.space_directory import DEFAULT_PARENT

    # The nodes read the space file and the task where they lie: nothing of it is sent.
    study = run_name(space, Parcel(files={})) if name is None else checked_name(name, "--name")
    return EmitPlan(
        study=study,
        folder=str(space.path.parent.absolute()),
        called_from=str(Path.cwd()),
        space=space.path.name,
        overrides=tuple(overrides),
        output=str((DEFAULT_PARENT / study).absolute()),
        version=__version__,
        ray_version=version("ray"),
        **wishes.given(),  # type: ignore[arg-type]
    )
