"""What every node of a cluster is like: asked before any study, and kept nowhere.

The comparison is that of `nodes`, made before a study; here it is told, with what is free on each
node, and refuses nothing.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stability_search import ray_token
from stability_search.interruption import Signals
from stability_search.search.driver import Cluster, output_to
from stability_search.search.joining import refuse_unusable
from stability_search.search.machine import Machine, Node
from stability_search.search.nodes import (
    NodeFacts,
    ask_nodes,
    differences,
    facts_here,
    failed,
    names_of,
)

_CGROUP = Path("/sys/fs/cgroup")
_OF_HEAD = "node:__internal_head__"  # Ray gives it to the head alone


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeState:
    """What a node says of itself.

    Attributes:
        facts: Its versions.
        disk_free_bytes: Of the folder for temporary files, in which Ray keeps its own.
        memory_free_bytes: What a process may still take; None where the system does not say.
        clock_s: Its clock, seconds since 1970.
    """

    facts: NodeFacts
    disk_free_bytes: int
    memory_free_bytes: int | None
    clock_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SurveyedNode:
    """One node of a cluster.

    Attributes:
        name: Its host, and a part of Ray's id where several are on one host.
        node: What it offers.
        num_slots: Trials that fit onto it, each with one CPU core and, where the cluster has
            GPUs, one GPU.
        state: What it says of itself; None where it said nothing.
        skew_s: Seconds by which its clock is ahead of ours, beyond what asking took; negative
            behind, 0 where no difference shows, None where it said nothing.
        problems: In what it differs from here, a phrase each; empty if in nothing.
    """

    name: str
    node: Node
    num_slots: int
    state: NodeState | None = None
    skew_s: float | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """A cluster that was joined.

    Attributes:
        here: What this machine is like.
        nodes: Its living nodes, by name.
        dashboard: `HOST:PORT` on which its head offers the dashboard; empty for none.
        is_head_here: True if this machine is the head.
        has_sent_token: True if a token went along when it was joined, asked for or not.
        seconds: How long joining and asking took.
    """

    here: NodeFacts
    nodes: tuple[SurveyedNode, ...]
    dashboard: str = ""
    is_head_here: bool = False
    has_sent_token: bool = False
    seconds: float = field(default=0.0, compare=False)


def survey(address: str) -> Survey:
    """Join a cluster, ask every living node what it is like, and leave it.

    Args:
        address: `auto`, or `HOST:PORT` of its head.

    Raises:
        InfrastructureError: The cluster does not answer, or cannot be joined from here.
        Interrupted: A signal arrived.
    """
    refuse_unusable(address)
    signals, began = Signals(), time.monotonic()
    signals.install()
    try:
        with output_to(Path(os.devnull)), Cluster(address) as cluster:
            cluster.wait(signals)
            signals.install()  # Ray has taken SIGTERM
            nodes = cluster.nodes()
            asked_at = time.time()
            words = [node.node_id for node in nodes]
            answers, failures = ask_nodes(state_there, (), words, signals.check)
            left = {node.node_id for node in cluster.nodes()} if failures else {*words}
            here = facts_here("")
            return Survey(
                here=here,
                nodes=compared(
                    [node for node in nodes if node.node_id in left],
                    answers,
                    failures,
                    here=here,
                    asked=(asked_at, time.time()),
                ),
                dashboard=_dashboard(),
                is_head_here=any(
                    node.host == here.host and _OF_HEAD in node.resources for node in nodes
                ),
                has_sent_token=ray_token.is_sent(os.environ),
                seconds=time.monotonic() - began,
            )
    finally:
        signals.restore()


def compared(
    nodes: Sequence[Node],
    answers: Mapping[str, NodeState],
    failures: Mapping[str, str],
    *,
    here: NodeFacts,
    asked: tuple[float, float],
) -> tuple[SurveyedNode, ...]:
    """Return what each node is like, and in what it differs from here.

    Args:
        nodes: The living nodes.
        answers: What they say of themselves, by Ray's id.
        failures: Why the others say nothing.
        here: What this machine is like.
        asked: Our clock before the first question and after the last answer.
    """
    needs_gpu = any(node.resources.get("GPU", 0.0) >= 1 for node in nodes)
    machine = Machine(
        device="cuda" if needs_gpu else "cpu",
        num_slots=0,
        cpu_per_trial=1.0,
        gpu_per_trial=1.0 if needs_gpu else 0.0,
    )
    slots = {node.node_id: machine.num_slots_on(node) for node in nodes}
    told = {node_id: state.facts for node_id, state in answers.items() if node_id in slots}
    of_trials = {node_id: facts for node_id, facts in told.items() if slots[node_id]}
    of_others = {node_id: facts for node_id, facts in told.items() if not slots[node_id]}
    listed = [
        *differences(of_trials, here, is_cuda=needs_gpu),
        *differences(of_others, here, is_cuda=False),
        *(failed(node_id, text, here) for node_id, text in failures.items()),
    ]
    names = names_of(nodes)
    found = (
        SurveyedNode(
            name=names[node.node_id],
            node=node,
            num_slots=slots[node.node_id],
            state=answers.get(node.node_id),
            skew_s=_skew(answers.get(node.node_id), asked),
            problems=tuple(str(one) for one in listed if one.node == node.node_id),
        )
        for node in nodes
    )
    return tuple(sorted(found, key=lambda one: one.name))


def state_there() -> NodeState:
    """Return what the machine is like on which this runs."""
    return NodeState(
        facts=facts_here(""),
        disk_free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        memory_free_bytes=memory_free_bytes(Path("/proc/meminfo"), _CGROUP),
        clock_s=time.time(),
    )


def memory_free_bytes(meminfo: Path, cgroup: Path) -> int | None:
    """Return what a process may still take: of the machine's memory, or of its container's.

    Args:
        meminfo: Linux's `/proc/meminfo`.
        cgroup: Folder of the control group, version 2; what it does not limit has no file there.

    Returns:
        Bytes; None where the system does not say.
    """
    free = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = meminfo.read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # "max" for no limit
        limit = int((cgroup / "memory.max").read_text())
        free.append(max(0, limit - int((cgroup / "memory.current").read_text())))
    return min(free, default=None)


def _skew(state: NodeState | None, asked: tuple[float, float]) -> float | None:
    if state is None:
        return None
    before, after = asked
    return min(0.0, state.clock_s - before) or max(0.0, state.clock_s - after)


def _dashboard() -> str:
    import ray

    return str(ray._private.worker.get_dashboard_url() or "")  # type: ignore[no-untyped-call]  # noqa: SLF001 - no public way
