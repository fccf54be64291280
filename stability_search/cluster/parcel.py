"""The files that are sent with a study: its space file, and its task's file or package."""

import hashlib
import importlib.machinery
import io
import re
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stability_search.cluster.ignoring import files_of
from stability_search.errors import UsageError
from stability_search.neighbours import with_neighbours
from stability_search.space import Space
from stability_search.space_directory import task_facts, text_beside_task

SPACE_FILE = "space.yaml"
MAX_MIB = 50  # every node unpacks all of it
_RAYS_MIB = 100  # its dashboard takes no more
_MAX_NAMED = 5
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same content is the same archive, whenever it is made
_SURROGATE = re.compile("[\ud800-\udfff]")  # of a name that is no UTF-8
_BUILTIN = "stability_search."


@dataclass(frozen=True, kw_only=True, slots=True)
class Parcel:
    """What is sent to a cluster.

    Attributes:
        files: Content by path in the job's working directory.
        notes: What a user must know about what is not sent, one sentence each.
    """

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()

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
    space: Space, *, max_mib: float = MAX_MIB, search_path: Sequence[str] | None = None
) -> Parcel:
    """Collect what a cluster needs of a study; nothing that is collected is imported.

    Args:
        space: The study's space; its text has `--set` applied.
        max_mib: Most that may be sent, MiB; up to what Ray's dashboard takes, 100.
        search_path: Folders in which a task's module is looked for; None takes those of Python,
            the present folder first.

    Raises:
        UsageError: The task's file or package is not there or cannot be read, or all of it is
            too large.
    """
    if not 0 < max_mib <= _RAYS_MIB:
        raise UsageError(
            f"--max-upload-mib: more than 0 and at most {_RAYS_MIB} is needed, but got "
            f"{max_mib:g}: Ray's dashboard takes no more."
        )
    space_file = {SPACE_FILE: text_beside_task(space).encode()}
    if space.task.file:
        files, notes = _file_of(space)
    elif space.task.module.startswith(_BUILTIN):
        files, notes = {}, ()
    else:
        paths, notes = _package_of(space, search_path or [str(Path.cwd()), *sys.path])
        _refuse_too_large({name: _size_of(path) for name, path in paths.items()}, max_mib)
        files = {name: _content_of(path) for name, path in paths.items()}
    parcel = Parcel(files=space_file | files, notes=notes)
    _refuse_too_large({name: len(content) for name, content in parcel.files.items()}, max_mib)
    return parcel


_WAYS_OUT = (
    "Name what need not be sent in .gitignore, keep data on the cluster's own disks and name it "
    "by its absolute path, or raise --max-upload-mib."
)


def _refuse_too_large(sizes: Mapping[str, int], max_mib: float) -> None:
    total = sum(sizes.values())
    if total <= max_mib * 2**20:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
    names = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in largest)
    raise UsageError(
        f"upload: at most {max_mib:g} MiB may be sent, but it is {total / 2**20:.1f} MiB in "
        f"{len(sizes)} files (largest: {names}).",
        hint=_WAYS_OUT,
    )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _cannot_read(path, error) from error


def _content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{path}: it cannot be sent: {error.strerror}.",
        hint="Name it in .gitignore, or mend that.",
    )


def _file_of(space: Space) -> tuple[dict[str, bytes], tuple[str, ...]]:
    name = str(task_facts(space)["task_file"])  # its place beside the space file; it can be read
    path = Path(space.task.file)
    content = _content_of(path)
    beside = {place.partition("/")[0].removesuffix(".py") for place in with_neighbours(path)}
    notes = tuple(
        f"{path.name} imports {module}, which lies beside it and is not sent: only the task's own "
        "file is. Make both a package and name the task as package.module:Class."
        for module in sorted(beside - {path.stem})
    )
    return {Path(name).as_posix(): content}, notes


def _package_of(
    space: Space, search_path: Sequence[str]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    top = space.task.module.partition(".")[0]
    spec = importlib.machinery.PathFinder.find_spec(top, list(search_path))
    places = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
    if not places or places[0] is None:
        raise UsageError(
            f"task: no package {top} for {space.task_name} in this folder or on Python's path.",
            hint="Call submit from the folder that holds it, or install it.",
        )
    place = Path(places[0]).absolute()
    if _is_installed(place):
        note = f"{top} is installed here and not sent: it must be installed on the cluster, too."
        return {}, (note,)
    if place.is_file():
        return {place.name: place}, ()
    try:
        found = files_of(place)
    except OSError as error:
        raise _cannot_read(Path(error.filename), error) from error
    paths = {path.relative_to(place.parent).as_posix(): path for path in found.sent}
    odd = next((name for name in paths if _SURROGATE.search(name)), None)
    if odd is not None:
        raise UsageError(f"{odd!r}: a name in UTF-8 is needed of a file that is sent.")
    return paths, _secret_notes([path.relative_to(place.parent) for path in found.secrets])


def _secret_notes(secrets: Sequence[Path]) -> tuple[str, ...]:
    if not secrets:
        return ()
    rest = len(secrets) - _MAX_NAMED
    names = ", ".join(path.as_posix() for path in secrets[:_MAX_NAMED])
    more = f" and {rest} more" if rest > 0 else ""
    what = f"not sent, as names of passwords and keys: {names}{more}"
    return (f"{what}. What the task needs of it must be called otherwise.",)


def _is_installed(path: Path) -> bool:
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return any(path.is_relative_to(place) for place in places) or "site-packages" in path.parts
