"""The files that are sent with a study: its space file, and what its task needs."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stability_search import task_files
from stability_search.errors import UsageError
from stability_search.space import Space, study_identity
from stability_search.space_directory import place_beside_space, text_beside_task
from stability_search.task_files import content_of, files_of_task, refuse_unsendable

SPACE_FILE = "space.yaml"
MAX_MIB = task_files.MAX_MIB
_RAYS_MIB = 100  # its dashboard takes no more
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same content is the same archive, whenever it is made


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """What is sent to a cluster.

    Attributes:
        files: Content by path in the job's working directory.
        notes: What a user must know about what is not sent, one sentence each.
        identity: Of the space as it is sent; see `study_identity`.
    """

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    identity: str = ""

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(len(content) for content in self.files.values())

    @property
    def sha256(self) -> str:
        """Hash of every path and content."""
        found = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            found.update(f"{path}\0{len(content)}\0".encode(errors="surrogateescape"))
            found.update(content)
        return found.hexdigest()

    @property
    def task_sha256(self) -> str:
        """The same of everything but the space file."""
        return Parcel(files={k: v for k, v in self.files.items() if k != SPACE_FILE}).sha256

    @property
    def package_name(self) -> str:
        """Name of the archive, as Ray names those of its own."""
        return f"_ray_pkg_{self.sha256[:32]}.zip"

    def archive(self) -> bytes:
        """Return all files as one archive."""
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in sorted(self.files.items()):
                entry = zipfile.ZipInfo(path, _LONG_AGO)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o600 << 16
                archive.writestr(entry, content)
        return stream.getvalue()


def make_parcel(
    space: Space, *, max_mib: float = MAX_MIB, import_path: Path | None = None
) -> Parcel:
    """Collect what a cluster needs of a study; nothing that is collected is imported.

    Args:
        space: The study's space; its text has `--set` applied.
        max_mib: Most that may be sent, MiB; up to what Ray's dashboard takes, 100.
        import_path: Folder in which a task's module is looked for before those of Python; None
            for the present one.

    Raises:
        UsageError: The task's file or package is not there or cannot be read, or all of it is
            too large.
    """
    if not 0 < max_mib <= _RAYS_MIB:
        raise UsageError(
            f"--max-upload-mib: more than 0 and at most {_RAYS_MIB} is needed, but got "
            f"{max_mib:g}: Ray's dashboard takes no more."
        )
    found = files_of_task(space.task, import_path=import_path or Path.cwd())
    if found is None:
        raise UsageError(
            f"task: no package {space.task.module.partition('.')[0]} for {space.task_name} in "
            "this folder or on Python's path.",
            hint="Call submit from the folder that holds it, or install it.",
        )
    place = place_beside_space(space)
    folder = Path(place).parent  # of the task's file, as its space names it
    notes = list(found.notes(folder))
    if found.module:
        there = "it must be installed on the cluster, too."
        notes.append(f"{found.module} is installed here and not sent: {there}")
    paths = {(folder / name).as_posix(): path for name, path in found.files.items()}
    refuse_unsendable(paths, max_mib=max_mib, way_out=_WAYS_OUT)
    files = {name: content_of(path) for name, path in paths.items()}
    sent_task = f"{place}:{space.task_name.rpartition(':')[2]}" if place else space.task_name
    return Parcel(
        files={SPACE_FILE: text_beside_task(space).encode(), **files},
        notes=tuple(notes),
        identity=study_identity(replace(space, task_name=sent_task)),
    )


_WAYS_OUT = (
    "Name what need not be sent in .gitignore, keep data on the cluster's own disks and name it "
    "by its absolute path, or raise --max-upload-mib."
)
