"""The files of a task on their way to the nodes of a cluster, and their hash.

What is installed is expected on every node, and its content is compared there. Anything else that
a task needs travels. Data does not: a folder that a task reads must be there on every node.
"""

import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stability_search.files import cannot_write
from stability_search.neighbours import files_in
from stability_search.settings.trial import TaskReference
from stability_search.task_files import (
    MAX_MIB,
    content_of,
    files_of_installed,
    files_of_task,
    refuse_unsendable,
    size_of,
)

_PREFIX = "stability_search_task_"  # of the folder they travel in


@dataclass(frozen=True, kw_only=True, slots=True)
class Cargo:
    """The files of a task.

    Attributes:
        files: Where each is on this machine, by its path in the folder that travels.
        folder: What that folder is a copy of: the task's file or package lies in it. Empty where
            nothing travels.
        module: An installed package that the task is in; empty for none. It does not travel.
        digest: Hash of the Python files among them, or of the installed package; empty for a
            built-in task.
        notes: What a user must know about what does not travel, one sentence each.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    folder: str = ""
    module: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the folder that travels; empty where none does."""
        return f"{_PREFIX}{self.digest}" if self.files else ""

    def refuse_unsendable(self) -> None:
        """Refuse what cannot or should not travel to every node.

        Raises:
            UsageError: The files are larger than 50 MiB together, or one has an odd name.
        """
        refuse_unsendable(
            self.files,
            max_mib=MAX_MIB,
            way_out="Move data out of the package, or install the package on every node.",
        )

    def __str__(self) -> str:
        """Say how much it is."""
        num_bytes = sum(map(size_of, self.files.values()))
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{count} ({num_bytes / 2**10:.1f} KiB)"

    def write(self, parent: Path) -> Path:
        """Copy the files into a folder of that name and return it.

        Raises:
            UsageError: One of them cannot be read.
            StoppedEarlyError: The copy cannot be written.
        """
        root = parent / self.name
        for name, source in self.files.items():
            content, copy = content_of(source), root / name
            try:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(content)
            except OSError as error:
                raise cannot_write(copy, error) from error
        return root


def pack(task: TaskReference, *, import_path: Path) -> Cargo:
    """Find the files of a task.

    Args:
        task: Where its class is.
        import_path: Folder in which modules are looked for first, as workers do.

    Raises:
        UsageError: A folder of them cannot be read.
    """
    found = files_of_task(task, import_path=import_path)
    if found is None:  # the trial says so
        return Cargo()
    return Cargo(
        files=found.files,
        folder=found.folder,
        module=found.module,
        digest=installed_digest(found.module) if found.module else digest_of(found.files),
        notes=found.notes(),
    )


def installed_digest(module: str) -> str:
    """Return the hash of an installed package's code as `Cargo.digest` has it; empty for none."""
    return digest_of(files_of_installed(module))


@functools.cache
def own_digest() -> str:
    """Return the hash of this package's code: a checkout may differ under one version."""
    return digest_of(files_in(Path(__file__).resolve().parents[1]))


def digest_of(files: Mapping[str, Path]) -> str:
    """Return a short hash of the Python files among some; empty where there are no files.

    Args:
        files: Where each is, by its path, which counts as well.
    """
    if not files:
        return ""
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        if path.suffix == ".py":
            try:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError:  # whoever imports it says so
                content = "unreadable"
            whole.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()[:10]


def travelled(name: str) -> Path | None:
    """Return the folder that travelled to this node; None where it has not arrived."""
    found = (Path(place) / name for place in sys.path)
    return next((root for root in found if root.is_dir()), None)
