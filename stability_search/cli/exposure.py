"""Checks of who else can reach what Ray runs on this machine: tokens and dashboards.

Ray's dashboard runs whatever code it is sent, by design.
"""

import ipaddress
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stability_search.cli.checks import Check, State
from stability_search.ray_token import MODE, TOKEN, TOKEN_FILE, TOKEN_PATH

_DEFAULT_PORT = "8265"
_TUNNEL = "start Ray with --dashboard-host=127.0.0.1, and reach it by ssh -L 8265:localhost:8265"


def check_token(environment: Mapping[str, str], home: Path) -> Check:
    """Check how Ray asks who may use a cluster, and who may read the token.

    Args:
        environment: Variables as Ray reads them.
        home: Folder whose `.ray/auth_token` is Ray's own place for a token.
    """
    name = "token"
    mode = environment.get(MODE, "")
    if mode.lower() not in {"", "token"}:
        found = f"{MODE} is {mode}: anyone who reaches a Ray port can run code"
        return Check(name=name, state=State.WARN, found=found, fix=f"unset {MODE}")
    if environment.get(TOKEN):
        found = f"taken from {TOKEN}, which every process that is started from here can read"
        fix = f"write it to a file of mode 600 and name that in {TOKEN_PATH}"
        return Check(name=name, state=State.WARN, found=found, fix=fix)
    named = environment.get(TOKEN_PATH, "")
    path = Path(named) if named else home / TOKEN_FILE
    try:
        mode_bits = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        if named:
            found = f"{path}, named in {TOKEN_PATH}, cannot be read: {error.strerror}"
            return Check(name=name, state=State.FAIL, found=found, fix=f"mend {TOKEN_PATH}")
        found = "none yet; one is made when Ray first starts, and asked for"
        return Check(name=name, state=State.OK, found=found)
    found = f"{path}, mode {mode_bits:03o}"
    if mode_bits & 0o077:
        found = f"{found}: others on this machine may read it"
        return Check(name=name, state=State.WARN, found=found, fix=f"chmod 600 {path}")
    return Check(name=name, state=State.OK, found=found)


def check_entry(*, has_sent_token: bool, is_asked_for: bool | None) -> Check:
    """Check that a cluster which let this process in asks everybody for a token.

    Args:
        has_sent_token: True if this process sent one.
        is_asked_for: True if the dashboard let nobody in without one, False if it did; None if
            that was not seen.
    """
    name = "token"
    fix = f"start Ray with {MODE}=token on every node, and keep others off its ports"
    if not has_sent_token:
        found = "OPEN: it let us in without a token, and so whoever reaches its ports"
        return Check(name=name, state=State.WARN, found=found, fix=fix)
    if is_asked_for:
        return Check(name=name, state=State.OK, found="one was sent, and nobody gets in without")
    if is_asked_for is None:
        found = "a token was sent; whether it is demanded cannot be told from here"
        fix = "ask on the head itself, or its dashboard: `stability-search doctor --address URL`"
    else:
        found = "OPEN: a token was sent, but the dashboard demands none: nor will the other ports"
    return Check(name=name, state=State.WARN, found=found, fix=fix)


def check_dashboards(command_lines: Iterable[Sequence[str]]) -> Check:
    """Check that no Ray dashboard of this machine can be reached from others.

    Args:
        command_lines: Words of every process that can be seen.
    """
    name = "dashboard"
    addresses = sorted(set(_dashboards(command_lines)))
    opened = [f"{host}:{port}" for host, port in addresses if not _is_loopback(host)]
    if opened:
        found = f"Ray's dashboard listens on {', '.join(opened)}, which other machines may reach"
        fix = f"{_TUNNEL}; a token alone does not encrypt"
        return Check(name=name, state=State.WARN, found=found, fix=fix)
    if not addresses:
        return Check(name=name, state=State.OK, found="none runs here")
    shown = ", ".join(f"{host}:{port}" for host, port in addresses)
    return Check(name=name, state=State.OK, found=f"on {shown}, this machine only")


def check_door(url: str, *, is_loopback: bool, is_open: bool) -> Check:
    """Check that a dashboard asks who is there.

    Args:
        url: Where it was asked.
        is_loopback: True if that is an address of one machine alone.
        is_open: True if it answered without a token.
    """
    name = "dashboard"
    if not is_open:
        return Check(name=name, state=State.OK, found=f"{url} asks for a token")
    fix = f"start Ray with {MODE}=token, and keep others off its ports"
    found = f"OPEN: {url} asks for no token, so {{}} can run any code on the cluster"
    if is_loopback:  # at the other end of a tunnel it may be open to more
        found = found.format("everybody on that machine")
        return Check(name=name, state=State.WARN, found=found, fix=fix)
    return Check(name=name, state=State.FAIL, found=found.format("whoever reaches it"), fix=fix)


def command_lines() -> Iterator[list[str]]:
    """Return the words of every process that can be seen; none where there is no /proc."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        yield words


def _dashboards(lines: Iterable[Sequence[str]]) -> Iterator[tuple[str, str]]:
    for words in lines:
        if any(word.endswith("ray/dashboard/dashboard.py") for word in words):
            options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
            yield options.get("host", "127.0.0.1"), options.get("port", _DEFAULT_PORT)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name: where it leads is not looked up
        return False
