"""The files that are sent with a study: its space file, and its task's file or package."""

import ast
import hashlib
import importlib.machinery
import io
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stability_search.cluster.ignoring import files_of
from stability_search.errors import UsageError
from stability_search.space import Space
from stability_search.space_directory import task_facts, text_beside_task

SPACE_FILE = "space.yaml"
MAX_MIB = 50  # Ray's dashboard takes 100 MiB, and every node unpacks all of it
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same content is the same archive, whenever it is made
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
        UsageError: The task's file or package is not there, or all of it is too large.
    """
    space_file = {SPACE_FILE: text_beside_task(space).encode()}
    if space.task.file:
        files, notes = _file_of(space)
    elif space.task.module.startswith(_BUILTIN):
        files, notes = {}, ()
    else:
        files, notes = _package_of(space, search_path or [str(Path.cwd()), *sys.path])
    parcel = Parcel(files=space_file | files, notes=notes)
    if parcel.num_bytes > max_mib * 2**20:
        raise UsageError(_too_large(parcel, max_mib), hint=_WAYS_OUT)
    return parcel


_WAYS_OUT = (
    "Name what need not be sent in .gitignore, keep data on the cluster's own disks and name it "
    "by its absolute path, or raise --max-upload-mib."
)


def _too_large(parcel: Parcel, max_mib: float) -> str:
    largest = sorted(parcel.files.items(), key=lambda item: -len(item[1]))[:3]
    names = ", ".join(f"{path} {len(content) / 2**20:.1f} MiB" for path, content in largest)
    return (
        f"upload: at most {max_mib:g} MiB may be sent, but it is "
        f"{parcel.num_bytes / 2**20:.1f} MiB in {len(parcel.files)} files (largest: {names})."
    )


def _file_of(space: Space) -> tuple[dict[str, bytes], tuple[str, ...]]:
    name = str(task_facts(space)["task_file"])  # its place beside the space file; it can be read
    path = Path(space.task.file)
    content = path.read_bytes()
    beside = sorted(_imported_from_beside(content, path))
    notes = tuple(
        f"{path.name} imports {module}, which lies beside it and is not sent: only the task's own "
        "file is. Make both a package and name the task as package.module:Class."
        for module in beside
    )
    return {Path(name).as_posix(): content}, notes


def _imported_from_beside(content: bytes, path: Path) -> Iterator[str]:
    """Find imported modules that are files or folders beside a task's file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file's own escapes are not our business
        tree = ast.parse(content)
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    for name in names - {path.stem}:
        if (path.parent / f"{name}.py").is_file() or (path.parent / name).is_dir():
            yield name


def _package_of(
    space: Space, search_path: Sequence[str]
) -> tuple[dict[str, bytes], tuple[str, ...]]:
    top = space.task.module.partition(".")[0]
    found = importlib.machinery.PathFinder.find_spec(top, list(search_path))
    places = [] if found is None else [*(found.submodule_search_locations or ()), found.origin]
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
        return {place.name: place.read_bytes()}, ()
    paths = {path.relative_to(place.parent).as_posix(): path for path in files_of(place)}
    return {name: path.read_bytes() for name, path in paths.items()}, ()


def _is_installed(path: Path) -> bool:
    places = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return any(path.is_relative_to(place) for place in places) or "site-packages" in path.parts
