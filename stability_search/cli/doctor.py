"""Checks of the machine a study is to run on: one line each, with the fix.

What is looked at comes in as arguments, so that every verdict can be tested without the machine
that earns it.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement

from stability_search.cli.checks import Check, State
from stability_search.cli.exposure import check_dashboards, check_token, command_lines
from stability_search.inert import inert
from stability_search.records.values import Json

SCHEMA = "stability-search/doctor/1"

_MIB = 1024**2
_LITTLE_DISK, _NO_DISK = 2048 * _MIB, 256 * _MIB
_OBJECT_STORE = 75 * _MIB  # the least Ray starts with
_LITTLE_SHARED_MEMORY = 2 * _OBJECT_STORE
_OLDEST_PYTHON = (3, 11)
_INSTALL = "pip install -c constraints.txt ."
_EXIT_FAILED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchFacts:
    """What torch says about this machine.

    Attributes:
        version: Its version.
        has_cpu_bf16: True if a bf16 matrix product ran on the CPU.
        is_gpu_build: True if this build of torch can use a GPU at all.
        gpus: Names of the GPUs it sees.
        has_gpu_bf16: True if the first of them computes bf16 itself.
    """

    version: str
    has_cpu_bf16: bool
    is_gpu_build: bool
    gpus: tuple[str, ...] = ()
    has_gpu_bf16: bool = False


def examine(folder: Path) -> list[Check]:
    """Look at this machine.

    Args:
        folder: Where run directories would be made.
    """
    return [
        check_python(sys.version_info[:3]),
        *check_packages(_requirements(), _installed),
        *check_torch(_torch_facts(), has_driver=shutil.which("nvidia-smi") is not None),
        check_disk(folder, free=shutil.disk_usage(folder).free),
        check_storage(folder),
        check_shared_memory(_shared_memory_free()),
        check_token(os.environ, Path.home()),
        check_dashboards(command_lines()),
        check_chromium(shutil.which("chromium")),
    ]


def lines(checks: Sequence[Check]) -> list[str]:
    """Return one line per check, and a last one that counts them."""
    width = max(len(check.name) for check in checks)
    text = [
        inert(
            f"{check.state:<4}  {check.name:<{width}}  {check.found}"
            + (f". Fix: {check.fix}" if check.fix else "")
        )
        for check in checks
    ]
    counts = [f"{sum(check.state is state for check in checks)} {state}" for state in State]
    return [*text, ", ".join(counts)]


def rows(checks: Sequence[Check]) -> list[dict[str, Json]]:
    """Return a row per check, for programs and spreadsheets."""
    return [asdict(check) for check in checks]


def exit_code(checks: Sequence[Check]) -> int:
    """Return 4 if a check failed, else 0."""
    return _EXIT_FAILED if any(check.state is State.FAIL for check in checks) else 0


def check_python(version: Sequence[int]) -> Check:
    """Check the interpreter's version, (major, minor, patch)."""
    found = ".".join(str(part) for part in version)
    if tuple(version[:2]) < _OLDEST_PYTHON:
        return Check(name="python", state=State.FAIL, found=found, fix="install Python 3.11")
    return Check(name="python", state=State.OK, found=found)


def check_packages(
    requirements: Sequence[str] | None, installed: Callable[[str], str | None]
) -> list[Check]:
    """Check that what stability-search needs is there, in a version it was made for.

    Args:
        requirements: Its requirements as in package metadata; None if it is not installed itself.
        installed: Gives the installed version of a package; None if there is none.
    """
    if requirements is None:
        found = "stability-search runs from a folder, so no versions were checked"
        return [Check(name="packages", state=State.WARN, found=found, fix=_INSTALL)]
    needed = [Requirement(text) for text in requirements]
    return [
        _check_package(one, installed(one.name))
        for one in needed
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]


def _check_package(needed: Requirement, version: str | None) -> Check:
    if version is None:
        return Check(name=needed.name, state=State.FAIL, found="not installed", fix=_INSTALL)
    if not needed.specifier.contains(version, prereleases=True):
        found = f"{version}, but {needed.specifier} is needed"
        return Check(name=needed.name, state=State.FAIL, found=found, fix=_INSTALL)
    return Check(name=needed.name, state=State.OK, found=version)


def check_torch(facts: TorchFacts | None, *, has_driver: bool) -> list[Check]:
    """Check what torch can do here.

    Args:
        facts: What torch says; None if it cannot be imported.
        has_driver: True if an NVIDIA driver is installed.
    """
    if facts is None:
        found = "torch cannot be imported"
        return [Check(name="bf16 on CPU", state=State.FAIL, found=found, fix=_INSTALL)]
    cpu = (
        Check(name="bf16 on CPU", state=State.OK, found="works")
        if facts.has_cpu_bf16
        else Check(
            name="bf16 on CPU",
            state=State.WARN,
            found="does not work",
            fix="leave bf16 out of `precision`, or use a GPU",
        )
    )
    return [cpu, _check_gpu(facts, has_driver=has_driver)]


def _check_gpu(facts: TorchFacts, *, has_driver: bool) -> Check:
    name = "bf16 on GPU"
    if not facts.gpus and has_driver:
        build = "sees none" if facts.is_gpu_build else "is a build for the CPU"
        return Check(
            name=name,
            state=State.WARN,
            found=f"there is an NVIDIA driver, but torch {facts.version} {build}",
            fix="install the CUDA build of torch, or free the GPU",
        )
    if not facts.gpus:
        return Check(name=name, state=State.OK, found="no GPU; trials run on the CPU")
    found = f"{len(facts.gpus)} x {facts.gpus[0]}"
    if len(set(facts.gpus)) > 1:
        return Check(
            name=name,
            state=State.WARN,
            found=f"several models: {', '.join(facts.gpus)}",
            fix="hide all but one model with CUDA_VISIBLE_DEVICES",
        )
    if not facts.has_gpu_bf16:
        fix = "leave bf16 out of `precision`"
        return Check(name=name, state=State.WARN, found=f"{found}, without bf16", fix=fix)
    return Check(name=name, state=State.OK, found=found)


def check_disk(folder: Path, *, free: int) -> Check:
    """Check that a file can be written and made to stay, and that there is room for more.

    Args:
        folder: Where run directories would be made.
        free: Free bytes there.
    """
    found = f"{free / _MIB:.0f} MiB free in {folder}"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"stability-search")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found = f"{folder} cannot be written: {error.strerror}"
        return Check(name="disk", state=State.FAIL, found=found, fix="run elsewhere")
    fix = "free some, or run elsewhere"
    if free < _NO_DISK:
        return Check(name="disk", state=State.FAIL, found=found, fix=fix)
    if free < _LITTLE_DISK:
        return Check(name="disk", state=State.WARN, found=found, fix=fix)
    return Check(name="disk", state=State.OK, found=found)


def check_storage(folder: Path) -> Check:
    """Check that a ledger can be kept there: locks, and a transaction of SQLite.

    Args:
        folder: Where run directories would be made; network file systems often lack one of them.
    """
    name = "storage"
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".stability-search-") as trial:
            _keep_a_ledger(Path(trial))
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        found = f"{folder} cannot hold a ledger: {reason}"
        return Check(name=name, state=State.FAIL, found=found, fix="run on a local disk")
    return Check(name=name, state=State.OK, found="locks and transactions work")


def _keep_a_ledger(folder: Path) -> None:
    """Take the lock that a study takes, and commit, as it does.

    Raises:
        OSError: Locks or renames do not work there.
        sqlite3.Error: Transactions do not.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with contextlib.closing(sqlite3.connect(folder / "part.db")) as connection, connection:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("CREATE TABLE trials (number INTEGER)")
            connection.execute("INSERT INTO trials VALUES (1)")
        (folder / "part.db").replace(folder / "whole.db")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_shared_memory(free: int | None) -> Check:
    """Check the shared memory that Ray keeps objects in.

    Args:
        free: Free bytes; None where the system has no /dev/shm.
    """
    name = "shared memory"
    if free is None:
        return Check(name=name, state=State.OK, found="no /dev/shm here; Ray uses files")
    found = f"{free / _MIB:.0f} MiB free in /dev/shm"
    if free < _LITTLE_SHARED_MEMORY:
        fix = "start the container with --shm-size=1g"
        return Check(
            name=name, state=State.WARN, found=f"{found}; Ray falls back to disk", fix=fix
        )
    return Check(name=name, state=State.OK, found=found)


def check_chromium(path: str | None) -> Check:
    """Check for the browser that the tests of the report open."""
    if path is None:
        found = "not found; only the tests of the report need it"
        return Check(
            name="chromium", state=State.WARN, found=found, fix="apt-get install chromium"
        )
    return Check(name="chromium", state=State.OK, found=path)


def _requirements() -> Sequence[str] | None:
    try:
        return importlib.metadata.requires("stability-search") or ()
    except importlib.metadata.PackageNotFoundError:
        return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shared_memory_free() -> int | None:
    folder = Path("/dev/shm")  # noqa: S108 - looked at, never written
    return shutil.disk_usage(folder).free if folder.is_dir() else None


def _torch_facts() -> TorchFacts | None:
    try:
        import torch
    except (ImportError, OSError):  # OSError: a library it needs is missing
        return None
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16)
        has_cpu_bf16 = bool((ones @ ones == 2).all())  # noqa: PLR2004 - 1*1 + 1*1
    except RuntimeError:
        has_cpu_bf16 = False
    gpus = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return TorchFacts(
        version=torch.__version__,
        has_cpu_bf16=has_cpu_bf16,
        is_gpu_build=torch.version.cuda is not None,
        gpus=gpus,
        has_gpu_bf16=bool(gpus) and torch.cuda.is_bf16_supported(including_emulation=False),
    )
