"""What each node of a cluster is like, and whether trials there can be compared with the others.

Before a study starts, one task on every node that could run a trial says which versions it has;
a node that joins later is asked before a trial of its own counts. What a trial ran on stays in its
row as a fingerprint. torch is not imported: what it was built for stands in a file of its own.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from stability_search.errors import InfrastructureError
from stability_search.neighbours import files_in
from stability_search.records.values import Json
from stability_search.search.machine import Machine, Node
from stability_search.search.shipping import (
    Cargo,
    digest_of,
    installed_digest,
    own_digest,
    pack,
    travelled,
)
from stability_search.settings.trial import TaskReference

ANSWER_S = 60.0  # a node has so long to say what it is like; starting a worker takes seconds
LATE_ANSWER_S = 10.0  # one that joins later: a worker lives there, and a study waits meanwhile
_POLL_S = 0.2  # signals are looked for so often
_SHOWN = 60  # characters of an error in the table
_MISSING = "missing"
_NO_MODULE = re.compile(r"No module named '(stability_search[\w.]*)'")

Answer = TypeVar("Answer")
Look = Callable[[], None]
"""Called several times a second while nodes are waited for; may raise to give up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """What decides whether trials on a node can be compared with others.

    Attributes:
        host: Its name.
        python: Version of Python.
        stability_search: Version of this package, and a hash of its code.
        ray: Version of Ray; empty where it is missing.
        torch: Version of torch, with the build (`+cu128`); empty where it is missing.
        cuda: CUDA version that torch was built for; empty for none.
        cpu: Model of the CPU; empty where the system does not say.
        modules: Hash of the task's files; empty for a built-in task.
    """

    host: str
    python: str
    stability_search: str
    ray: str
    torch: str
    cuda: str
    cpu: str
    modules: str = ""

    def fingerprint(self, device: str) -> str:
        """Return a short hash of all that can change a trial's numbers.

        Args:
            device: `cpu`, or the name of the GPU.
        """
        text = json.dumps({**asdict(self), "host": "", "device": device}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    def to_json(self) -> dict[str, Json]:
        """Return the facts as plain JSON."""
        return asdict(self)


def facts_here(modules: str) -> NodeFacts:
    """Return what this machine is like.

    Args:
        modules: Hash of the task's files.
    """
    torch, cuda = _torch_build()
    return NodeFacts(
        host=os.uname().nodename,
        python=platform.python_version(),
        stability_search=f"{_version('stability-search')} {own_digest()}",
        ray=_version("ray"),
        torch=torch,
        cuda=cuda,
        cpu=_cpu_model(),
        modules=modules,
    )


def facts_of_this_machine(_node_id: str) -> NodeFacts:
    """Return what this machine is like, for a task without files."""
    return facts_here("")


def facts_for(task: TaskReference) -> Callable[[str], NodeFacts]:
    """Return what says what this machine is like; the task's files are read at the first call.

    Args:
        task: What is trained.
    """

    @functools.cache
    def facts() -> NodeFacts:
        return facts_here(pack(task, import_path=Path.cwd()).digest)

    return lambda _node_id: facts()


def facts_there(name: str, module: str) -> NodeFacts:
    """Return what the node is like on which this runs as a task.

    Args:
        name: Of the folder that travelled; empty where none did.
        module: Installed package that the task is in; empty for none.
    """
    modules = ""
    if name:
        root = travelled(name)
        modules = digest_of(files_in(root)) if root is not None else _MISSING
    elif module:
        modules = installed_digest(module) or _MISSING
    return facts_here(modules)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _torch_build() -> tuple[str, str]:
    """Return torch's version and its CUDA's, without the second that importing it takes."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "", ""
    try:
        tree = ast.parse(Path(found.origin).with_name("version.py").read_text())
    except (OSError, SyntaxError):
        return _version("torch"), ""
    written: dict[str, object] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(targets[0], ast.Name) and isinstance(value, ast.Constant):
            written[targets[0].id] = value.value
    return str(written.get("__version__") or _version("torch")), str(written.get("cuda") or "")


@functools.cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


# -- comparing ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One thing in which a node differs.

    Attributes:
        node: Its name.
        what: What is different.
        there: Its value on the node.
        here: Its value on the driver's machine, or on most nodes.
    """

    node: str
    what: str
    there: str
    here: str

    def __str__(self) -> str:
        """Say it in a few words."""
        return f"{self.what} {self.there} there, {self.here} here"


def differences(
    found: Mapping[str, NodeFacts], here: NodeFacts, *, is_cuda: bool
) -> tuple[Difference, ...]:
    """Compare nodes with the driver's machine.

    The driver may have no GPU, and a torch without CUDA: how torch was built is compared among
    the nodes, where trials run on GPUs.

    Args:
        found: What each node is like, by its name.
        here: What this machine is like.
        is_cuda: True where trials run on GPUs.
    """
    listed = []
    for node, there in found.items():
        for what, name in _COMPARED.items():
            pair = getattr(there, name), getattr(here, name)
            if name == "torch":
                pair = pair[0].partition("+")[0], pair[1].partition("+")[0]
            listed.append((node, what, *pair))
    if is_cuda:
        builds = {node: facts.cuda for node, facts in found.items()}
        usual = Counter(build for build in builds.values() if build).most_common(1)
        expected = usual[0][0] if usual else "needed"
        listed += [(node, "CUDA of torch", build, expected) for node, build in builds.items()]
    return tuple(
        Difference(node=node, what=what, there=there or "none", here=expected or "none")
        for node, what, there, expected in listed
        if there != expected
    )


_COMPARED = {
    "Python": "python",
    "stability-search": "stability_search",
    "ray": "ray",
    "torch": "torch",
    "the task's files": "modules",
}


def as_table(found: Sequence[Difference]) -> str:
    """Return differences as a table of text, a row each."""
    rows = [("node", "what", "there", "here"), *((d.node, d.what, d.there, d.here) for d in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


# -- asking -------------------------------------------------------------------------------------


class Inspector:
    """Asks nodes of a cluster what they are like, each once.

    Args:
        cargo: The task's files.
        is_cuda: True where trials run on GPUs.
    """

    def __init__(self, cargo: Cargo, *, is_cuda: bool) -> None:
        self._cargo = cargo
        self._is_cuda = is_cuda
        self._here = facts_here(cargo.digest)
        self._facts: dict[str, NodeFacts] = {}
        self._problems: dict[str, str] = {}
        self._gpu_model = ""  # of every node that may run trials; empty where any will do
        self._living: Callable[[], Sequence[Node]] = tuple

    def facts_of(self, node_id: str) -> NodeFacts | None:
        """Return what a node is like; None for one that has not said it."""
        return self._facts.get(node_id)

    def check_all(self, machine: Machine, living: Callable[[], Sequence[Node]], look: Look) -> str:
        """Compare every node that could run a trial with this machine.

        A node that dies meanwhile is none: Ray takes seconds to notice the death of one.

        Args:
            machine: What a trial occupies.
            living: Returns the nodes of the cluster that live, as of now.
            look: Called while they answer.

        Returns:
            One line for the log.

        Raises:
            InfrastructureError: A node differs, or did not answer; or none is left.
        """
        nodes, self._living = living(), living
        usable = [node for node in nodes if machine.num_slots_on(node)]
        if self._is_cuda and machine.accelerator is None:
            self._gpu_model = next((node.gpu_model for node in usable), "")
        names = names_of(usable)
        begun = time.monotonic()
        failures = self._ask([node.node_id for node in usable], look)
        left = {node.node_id for node in living()} if failures else {*names}
        failures = {node_id: text for node_id, text in failures.items() if node_id in left}
        found = {
            names[node_id]: facts for node_id, facts in self._facts.items() if node_id in names
        }
        listed = [
            *differences(found, self._here, is_cuda=self._is_cuda),
            *(failed(names[node_id], text, self._here) for node_id, text in failures.items()),
        ]
        if listed:
            num_bad = len({one.node for one in listed})
            raise InfrastructureError(
                f"{num_bad} of {len(usable)} nodes cannot take part: what ran there could not be "
                f"compared with the rest.\n{as_table(listed)}",
                hint="Make them alike, or keep trials off them by search.resources.labels.",
            )
        if not found:
            raise InfrastructureError(
                "every node that could run a trial has died.",
                hint="Look at the cluster by `ray status`.",
            )
        seconds = time.monotonic() - begun
        return (
            f"{len(found)} of {len(nodes)} nodes can run trials and are alike: "
            f"Python {self._here.python}, torch {self._here.torch}, ray {self._here.ray} "
            f"({seconds:.1f} s)"
        )

    def problem_of(self, node_id: str, look: Look) -> str:
        """Return why a node that joined later must run no trial; empty if it may.

        Args:
            node_id: Ray's id of it; asked until it has answered.
            look: Called while it answers.

        Raises:
            TimeoutError: It did not answer in time.
        """
        if node_id not in self._facts and node_id not in self._problems:
            failures = self._ask([node_id], look, answer_s=LATE_ANSWER_S)
            if failures.get(node_id) == "":
                raise TimeoutError(
                    f"its node did not say within {LATE_ANSWER_S:g} s what it is like"
                )
            if failures:
                self._problems[node_id] = str(failed("", failures[node_id], self._here))
            else:
                facts = {"": self._facts[node_id]}
                listed = differences(facts, self._here, is_cuda=self._is_cuda)
                listed += self._other_gpus(node_id)
                self._problems[node_id] = "; ".join(map(str, listed))
        return self._problems.get(node_id, "")

    def _other_gpus(self, node_id: str) -> tuple[Difference, ...]:
        """Return that the GPUs of a node are of another model; those at the start are of one."""
        models = [node.gpu_model for node in self._living() if node.node_id == node_id]
        return tuple(
            Difference(node="", what="GPU", there=model or "none", here=self._gpu_model)
            for model in models
            if self._gpu_model and model != self._gpu_model
        )

    def _ask(
        self, node_ids: Sequence[str], look: Look, *, answer_s: float = ANSWER_S
    ) -> dict[str, str]:
        """Keep what nodes are like, and return why the others did not say it."""
        words = (self._cargo.name, self._cargo.module)
        answers, failures = ask_nodes(facts_there, words, node_ids, look, answer_s=answer_s)
        self._facts |= answers
        return failures


def ask_nodes(
    question: Callable[..., Answer],
    words: Sequence[str],
    node_ids: Sequence[str],
    look: Look,
    *,
    answer_s: float = ANSWER_S,
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Run a function as a task on each of some nodes; it takes no CPU from anybody.

    Args:
        question: The function.
        words: Its arguments.
        node_ids: Ray's ids of the nodes.
        look: Called while they answer.
        answer_s: Seconds they have together.

    Returns:
        What came back by node, and why nothing came from the others; empty for no answer in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(question)
    asked: dict[ray.ObjectRef[Answer], str] = {}
    for node_id in node_ids:
        there = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        asked[task.options(scheduling_strategy=there).remote(*words)] = node_id
    waiting, deadline = list(asked), time.monotonic() + answer_s
    answers: dict[str, Answer] = {}
    failures: dict[str, str] = {}
    while waiting and time.monotonic() < deadline:
        look()
        ready, waiting = ray.wait(waiting, num_returns=1, timeout=_POLL_S)
        for answer in ready:
            try:
                answers[asked[answer]] = ray.get(answer)
            except Exception as error:  # noqa: BLE001 - whatever went wrong there
                failures[asked[answer]] = str(error)
    for answer in waiting:
        ray.cancel(answer, force=True)
        failures[asked[answer]] = ""
    return answers, failures


def failed(node: str, text: str, here: NodeFacts) -> Difference:
    """Return why a node did not say what it is like, as a difference.

    Args:
        node: Its name.
        text: What went wrong there; empty for no answer in time.
        here: What this machine is like.
    """
    if not text:
        there = f"none within {ANSWER_S:g} s"
        return Difference(node=node, what="an answer", there=there, here="at once")
    missing = _NO_MODULE.search(text)
    if missing:
        there = _MISSING if missing[1] == "stability_search" else f"without {missing[1]}"
        return Difference(
            node=node, what="stability-search", there=there, here=here.stability_search
        )
    last = text.strip().splitlines()[-1].strip()
    shown = last if len(last) <= _SHOWN else f"{last[: _SHOWN - 3]}..."
    return Difference(node=node, what="an answer", there=shown, here="at once")


def names_of(nodes: Iterable[Node]) -> dict[str, str]:
    """Name nodes by their hosts, and by a part of Ray's id where several are on one host."""
    listed = list(nodes)
    count = Counter(node.host for node in listed)
    return {
        node.node_id: node.host if count[node.host] == 1 else f"{node.host}/{node.node_id[:6]}"
        for node in listed
    }
