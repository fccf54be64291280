"""Where a cluster is, and the token that it wants, as Ray itself looks for it."""

import ipaddress
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stability_search.errors import UsageError
from stability_search.ray_token import read_token

DASHBOARD_PORT = 8265
RAYS_OWN_PORTS = ("6379", "10001")  # of its control service, and of its client
_HOST = re.compile(r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|[0-9A-Fa-f]*:[0-9A-Fa-f:.]+")
_PORT = re.compile(r"\d{1,5}", re.ASCII)
_IN_A_URL = re.compile(r"[!-~]+")  # what is printable in ASCII, without blanks


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterAddress:
    """A cluster's dashboard, which is also its job interface.

    Attributes:
        url: `http://HOST:PORT` or `https://...`, without a slash at its end.
        is_loopback: True if nothing leaves this machine.
        token: What proves that we may use it; empty where there is none. Never shown.
    """

    url: str
    is_loopback: bool
    token: str = field(default="", repr=False)

    @property
    def is_readable_on_the_way(self) -> bool:
        """True if others on the way can read all that is sent, the token included."""
        return self.url.startswith("http://") and not self.is_loopback


def read_address(
    text: str, *, insecure: bool, environment: Mapping[str, str], home: Path
) -> ClusterAddress:
    """Return the address that `--address` names, with the token for it.

    Args:
        text: `http://HOST:PORT` or `https://HOST[:PORT]`.
        insecure: True allows plain HTTP to another machine, to which everything is then sent
            readable, a token too.
        environment: `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN` and `RAY_AUTH_TOKEN_PATH` are read as Ray
            reads them.
        home: Folder whose `.ray/auth_token` is Ray's own place for a token.

    Raises:
        UsageError: It is no such address, a token that must be there is not, or it would be
            plain HTTP to another machine. What may hold a password is not repeated.
    """
    url, is_loopback = read_url(text)
    token = read_token(environment, home)
    address = ClusterAddress(url=url, is_loopback=is_loopback, token=token)
    if address.is_readable_on_the_way and not insecure:
        raise UsageError(
            f"--address: plain HTTP to another machine is refused, but got {url}: whoever sits "
            "between can read and change all of it, a token too.",
            hint="Use a tunnel (ssh -L 8265:localhost:8265 HOST) and http://localhost:8265; or "
            "TLS and https://; or, in a network that you trust, add --insecure.",
        )
    return address


def checked_join_address(text: str) -> str:
    """Return the address of a cluster that this machine is a node of.

    Args:
        text: `auto`, or `HOST:PORT` of the cluster's head.

    Raises:
        UsageError: It is something else, with what takes it. What may hold a password is not
            repeated.
    """
    host, _, port = text.rpartition(":")
    if text == "auto" or (_HOST.fullmatch(host.strip("[]")) and _PORT.fullmatch(port)):
        return text
    hint = "On a machine of the cluster `auto` finds it; `ray status` names HOST:PORT."
    if is_url(text):
        hint = (
            "The URL of a dashboard is for `submit` and `doctor`; on a machine of the cluster "
            "use `auto`."
        )
    elif text.startswith("ray://"):
        hint = (
            "Ray Client is not used: on a machine of the cluster use `auto`; from elsewhere "
            "`submit --address http://localhost:8265`."
        )
    elif text == "local":
        hint = "Leave --address out for a Ray of its own on this machine."
    raise UsageError(
        f"--address: `auto` or HOST:PORT of a cluster's head is needed here, but got "
        f"{_shown(text)}.",
        hint=hint,
    )


def is_url(text: str) -> bool:
    """Say whether an address was meant as the URL of a dashboard."""
    return text.lower().startswith(("http://", "https://"))


def read_url(text: str) -> tuple[str, bool]:
    """Return a dashboard's URL without a slash at its end, and whether it is on this machine.

    Args:
        text: `http://HOST:PORT` or `https://HOST[:PORT]`.

    Raises:
        UsageError: It is no such address. What may hold a password is not repeated.
    """
    try:
        parts = urllib.parse.urlsplit(text)
        host, port = parts.hostname or "", parts.port
        is_clear = parts.scheme in {"http", "https"} and _IN_A_URL.fullmatch(text)
        has_password = parts.username is not None or parts.password is not None
    except ValueError:
        is_clear = None
    hint = _way_out(text)
    if not is_clear or (not has_password and not _HOST.fullmatch(host)):
        raise UsageError(f"--address: a URL is needed here, but got {_shown(text)}.", hint=hint)
    if has_password:
        raise UsageError(
            "--address: a URL without a user or a password is needed.",
            hint=f"{hint} A token belongs into the file that RAY_AUTH_TOKEN_PATH names.",
        )
    if parts.query or parts.fragment:
        raise UsageError("--address: a URL without ? and # is needed.", hint=hint)
    if _is_unspecified(host):
        raise UsageError(
            f"--address: {host} says where a dashboard listens, not how it is reached.",
            hint=f"On its own machine: {parts.scheme}://127.0.0.1:{port or DASHBOARD_PORT}.",
        )
    name = f"[{host}]" if ":" in host else host
    end = "" if port is None else f":{port}"
    return f"{parts.scheme}://{name}{end}{parts.path.rstrip('/')}", _is_loopback(host)


def _way_out(text: str) -> str:
    """Return how the URL that was meant may look."""
    scheme, _, rest = text.rpartition("://")
    host, _, port = rest.rpartition(":")
    if scheme in {"", "ray"} and _HOST.fullmatch(host) and _PORT.fullmatch(port):
        if scheme or port in RAYS_OWN_PORTS:
            return (
                f"{port} is a port of Ray itself; its dashboard has {DASHBOARD_PORT} by default."
            )
        return f"Try http://{rest}."
    return f"Give the URL of the cluster's dashboard, e.g. http://localhost:{DASHBOARD_PORT}."


def _shown(text: str) -> str:
    """Repeat what was given, unless a password may stand in it."""
    return "something else" if set("@?#") & set(text) else repr(text)


def _is_unspecified(host: str) -> bool:
    """Say whether a host means every interface of a machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # where other names lead is for a resolver to say
