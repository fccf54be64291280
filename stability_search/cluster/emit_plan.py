"""What a study needs on somebody else's scheduler: values only, from which text is made.

kuberay    a manifest for Kubernetes with KubeRay
slurm      a batch script for Slurm
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from stability_search.errors import UsageError

_NOT_IN_LABEL = re.compile(r"[^a-z0-9]+")
_LABEL_LENGTH = 47  # KubeRay makes longer names of it, which Kubernetes cuts at 63
_HASH_LENGTH = 8
_IMAGE = re.compile(r"[A-Za-z0-9][\w./:@-]*", re.ASCII)
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")  # in a path, an argument or a file of text
_RELEASE = re.compile(r"[0-9][\w.+-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFile:
    """A file that a study reads.

    Attributes:
        path: Where it lies, from the folder of the space file; with `/`, and never above it.
        content: Its bytes.
    """

    path: str
    content: bytes

    def __post_init__(self) -> None:
        """Refuse a path that leads out of the folder.

        Raises:
            UsageError: It is absolute, empty or leads upwards.
        """
        parts = PurePosixPath(self.path).parts
        is_inside = bool(parts) and ".." not in parts and not self.path.startswith("/")
        if not is_inside or _IMPOSSIBLE.search(self.path):
            raise UsageError(
                f"{self.path!r}: a file of a study must lie in the folder of its space file.",
                hint="Move it there.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EmitPlan:
    """A study for a scheduler: what is run, on how much, and where its results go.

    What one trial occupies stands in the space file (`search.resources`); here is how much there
    is for all of them.

    Attributes:
        study: Name of the study, any text.
        folder: Folder of the space file, as the nodes of the cluster see it. Slurm only.
        space: Path of the space file from that folder.
        called_from: Folder that the command is called from, where a task's modules may lie, as the
            nodes see it; empty for the one that the job starts in. Slurm only.
        output: The run directory, as the first node sees it. Slurm only: KubeRay's is on a volume.
        files: The space file and what its task is made of. KubeRay only: Slurm's nodes see them.
        overrides: `--set` as given, `key=value`.
        version: Version of stability-search that writes the text.
        ray_version: Version of Ray that the nodes must have.
        nodes: Nodes that run trials, >= 1.
        cpus_per_node: CPU cores of one of them, >= 1.
        gpus_per_node: GPUs of one of them, >= 0.
        memory_gib_per_node: Memory of one of them in GiB, >= 1. KubeRay only: on Slurm a node is
            taken as a whole.
        image: Container image with stability-search and Ray. KubeRay only, and needed there.
        storage_gib: Size of the volume for the results in GiB, >= 1. KubeRay only.
        time_limit_s: The scheduler ends the job after so many seconds, >= 1; None for what the
            scheduler itself has as its limit.
    """

    study: str
    folder: str
    space: str
    output: str
    version: str
    ray_version: str
    files: tuple[InputFile, ...] = ()
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    cpus_per_node: int = 8
    gpus_per_node: int = 0
    memory_gib_per_node: int = 32
    called_from: str = ""
    image: str = ""
    storage_gib: int = 10
    time_limit_s: int | None = None

    def __post_init__(self) -> None:
        """Refuse what neither scheduler would take, all at once.

        Raises:
            UsageError: A number is out of its range, or a text is not what it must be.
        """
        problems = [
            f"{name}: at least {least} is needed, but got {value}."
            for name, least, value in (
                ("--nodes", 1, self.nodes),
                ("--cpus-per-node", 1, self.cpus_per_node),
                ("--gpus-per-node", 0, self.gpus_per_node),
                ("memory_gib_per_node", 1, self.memory_gib_per_node),
                ("storage_gib", 1, self.storage_gib),
                ("--time-limit-s", 1, 1 if self.time_limit_s is None else self.time_limit_s),
            )
            if value < least
        ]
        if self.image and not _IMAGE.fullmatch(self.image):
            problems.append(f"--image: a container image must be named, but got {self.image!r}.")
        problems += [
            f"{name}: a version number is needed, but got {value!r}."
            for name, value in (("version", self.version), ("ray_version", self.ray_version))
            if not _RELEASE.fullmatch(value)
        ]
        problems += [
            f"{name}: a text in UTF-8 and without NUL is needed, but got {value!r}."
            for name, value in (
                ("--name", self.study),
                ("folder", self.folder),
                ("space", self.space),
                ("output", self.output),
                *(("--set", text) for text in self.overrides),
            )
            if _IMPOSSIBLE.search(value)
        ]
        if problems:
            raise UsageError("\n".join(problems))

    @property
    def label(self) -> str:
        """The study's name as schedulers take it; see `scheduler_label`."""
        return scheduler_label(self.study)


def scheduler_label(name: str) -> str:
    """Make a name that every scheduler takes: a DNS label that begins with a letter.

    Args:
        name: Any text.

    Returns:
        At most 47 characters of `a-z0-9-`; the name itself where it is one already, else with a
        hash of it, so that two names never become one label.

    Source:
        RFC 1035, section 2.3.1, which KubeRay asks for; Slurm takes any.

    Example:
        >>> scheduler_label("teacher")
        'teacher'
        >>> scheduler_label("My study!")
        'my-study-075eb1e2'
    """
    plain = _NOT_IN_LABEL.sub("-", name.lower()).strip("-")
    label = plain if plain[:1].isalpha() else f"study-{plain}".rstrip("-")
    if label == name and len(label) <= _LABEL_LENGTH:
        return label
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_LENGTH]
    return f"{label[: _LABEL_LENGTH - _HASH_LENGTH - 1].rstrip('-')}-{digest}"
