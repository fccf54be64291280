"""The nodes of a cluster as `doctor` shows them: a table of what is known of each."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from stability_search.inert import inert
from stability_search.records.values import Json

if TYPE_CHECKING:
    from stability_search.cluster.outside import Outside
    from stability_search.search.survey import Survey

_MIB, _GIB_OF_MIB = 2.0**20, 2.0**10


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLine:
    """What is known of a node; null or empty is unknown.

    Attributes:
        node: Its name.
        state: `alike`, `differs` or `silent` where it was asked, else `alive` or `dead`.
        trials: Trials of one CPU core, and of one GPU where the cluster has any, that fit on it.
        cpus: CPU cores that Ray gives to trials.
        gpus: GPUs that Ray gives to trials.
        gpu_model: Their model.
        memory_free_mib: Memory that is left, MiB.
        disk_free_mib: Disk that is left for temporary files, MiB.
        clock_s: Seconds by which its clock is ahead of ours.
        python: Version.
        torch: Version.
        cuda: Version of CUDA that torch was built for.
        ray: Version.
        stability_search: Version, and a hash of its code.
        problem: Why no trial may run there; empty for nothing.
    """

    node: str
    state: str
    trials: int | None = None
    cpus: float | None = None
    gpus: float | None = None
    gpu_model: str = ""
    memory_free_mib: float | None = None
    disk_free_mib: float | None = None
    clock_s: float | None = None
    python: str = ""
    torch: str = ""
    cuda: str = ""
    ray: str = ""
    stability_search: str = ""
    problem: str = ""


def lines_of_survey(found: "Survey") -> list[NodeLine]:
    """Return the nodes of a cluster that was joined."""
    return [
        NodeLine(
            node=one.name,
            state="silent" if one.state is None else "differs" if one.problems else "alike",
            trials=0 if one.problems else one.num_slots,
            cpus=one.node.resources.get("CPU", 0.0),
            gpus=one.node.resources.get("GPU", 0.0),
            gpu_model=one.node.gpu_model,
            memory_free_mib=None if one.state is None else _mib(one.state.memory_free_bytes),
            disk_free_mib=None if one.state is None else _mib(one.state.disk_free_bytes),
            clock_s=None if one.skew_s is None else round(one.skew_s, 1),
            python="" if one.state is None else one.state.facts.python,
            torch="" if one.state is None else one.state.facts.torch,
            cuda="" if one.state is None else one.state.facts.cuda,
            ray="" if one.state is None else one.state.facts.ray,
            stability_search="" if one.state is None else one.state.facts.stability_search,
            problem="; ".join(one.problems),
        )
        for one in found.nodes
    ]


def lines_from_outside(found: "Outside") -> list[NodeLine]:
    """Return the nodes that a dashboard tells."""
    return [
        NodeLine(
            node=one.name,
            state="alive" if one.is_alive else "dead",
            cpus=one.cpus,
            gpus=one.gpus,
            gpu_model=", ".join(one.gpu_models),
            memory_free_mib=_mib(one.memory_free_bytes),
            disk_free_mib=_mib(one.disk_free_bytes),
        )
        for one in found.nodes or ()
    ]


def table(nodes: Sequence[NodeLine]) -> list[str]:
    """Return a table of text, a row each; a column of which nothing is known is left out."""
    columns = [
        ("node", [one.node for one in nodes]),
        ("state", [one.state for one in nodes]),
        ("trials", [_number(one.trials) for one in nodes]),
        ("CPUs", [_number(one.cpus) for one in nodes]),
        ("GPUs", [f"{_number(one.gpus)} {one.gpu_model}".strip() for one in nodes]),
        ("memory free", [_gib(one.memory_free_mib) for one in nodes]),
        ("disk free", [_gib(one.disk_free_mib) for one in nodes]),
        ("clock", [_clock(one.clock_s) for one in nodes]),
        ("Python", [one.python for one in nodes]),
        ("torch", [one.torch for one in nodes]),
        ("CUDA", [one.cuda for one in nodes]),
        ("ray", [one.ray for one in nodes]),
        ("stability-search", [one.stability_search for one in nodes]),
    ]
    shown = [[title, *map(inert, cells)] for title, cells in columns if any(cells)]
    widths = [max(map(len, column)) for column in shown]
    rows = zip(*shown, strict=True)
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def rows(nodes: Iterable[NodeLine]) -> list[Json]:
    """Return a row per node, for programs."""
    return [asdict(one) for one in nodes]


def _mib(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else round(num_bytes / _MIB, 1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _gib(mib: float | None) -> str:
    return "" if mib is None else f"{mib / _GIB_OF_MIB:.1f} GiB"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:+.0f} s" if abs(seconds) >= 1 else "same"
