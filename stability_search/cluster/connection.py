"""One request to a cluster: its timeout, and what can go wrong, each in one line."""

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from stability_search.cluster.address import DASHBOARD_PORT, RAYS_OWN_PORTS, ClusterAddress
from stability_search.errors import InfrastructureError, UsageError

TIMEOUT_S = 30.0  # of connecting, and of every silence
LONGEST_S = 600.0  # of a whole answer, however slowly it comes; Ray's own for one file
MAX_BYTES = 64 * 2**20  # of an answer that is kept whole: a cluster must not fill our memory
_BLOCK_BYTES = 2**18
_MAX_WORDS = 300  # of what a cluster says about an error
_NO_DASHBOARD = f"Is this the URL of a Ray dashboard, e.g. http://localhost:{DASHBOARD_PORT}?"
_NO_HEAD = "Start its head, or mend the way to it: the tunnel, the name, the port."
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND = 401, 403, 404
# What Ray's dashboard says of a node whose agent has no port, and of one without an agent.
_NO_AGENT = re.compile(r":-1/api/job_agent/|Agent for node id\b.*\bdoesn't exist")


class NotThereError(InfrastructureError):
    """The cluster answers, and has no such thing."""


class AgentUnreachableError(InfrastructureError):
    """The cluster answers, but cannot ask one of its nodes: for a log, or for a file."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token would go along to another machine."""

    def redirect_request(self, *_: object) -> None:
        return


class Connection:
    """Requests to one cluster.

    Args:
        address: Where it is.
        timeout_s: Longest wait for a connection, or for the next bytes of an answer.
        clock: Seconds of a clock that does not run backwards.
    """

    def __init__(
        self,
        address: ClusterAddress,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = address.url
        self._headers = {"User-Agent": "stability-search"}
        if address.token:
            self._headers["Authorization"] = f"Bearer {address.token}"
        self._has_token = bool(address.token)
        self._timeout_s, self._clock = timeout_s, clock
        handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
        if address.is_loopback or address.is_readable_on_the_way:  # a proxy would read the token
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)

    def get_json(self, path: str, query: Mapping[str, str] | None = None) -> Any:  # noqa: ANN401 - JSON
        """Return what stands under a path.

        Raises:
            NotThereError: Nothing stands there.
            InfrastructureError: No answer, or none that can be read.
            UsageError: The token is missing or wrong.
        """
        return self._read_json(self.get(path, query))

    def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        """Return the bytes under a path; raises like `get_json`."""
        return self._whole(self.get_blocks(path, query))

    def get_blocks(self, path: str, query: Mapping[str, str] | None = None) -> Generator[bytes]:
        """Return the bytes under a path as they come, however many; raises like `get_json`."""
        end = f"?{urllib.parse.urlencode(query)}" if query else ""
        return self._send("GET", f"{path}{end}")

    def post_json(self, path: str, value: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON
        """Send a value and return the answer; raises like `get_json`."""
        body = json.dumps(value, allow_nan=False).encode()
        return self._read_json(self._whole(self._send("POST", path, body, "application/json")))

    def put(self, path: str, data: bytes) -> None:
        """Send bytes; raises like `get_json`."""
        self._whole(self._send("PUT", path, data, "application/octet-stream"))

    def delete(self, path: str) -> None:
        """Ask for something to be removed; raises like `get_json`."""
        self._whole(self._send("DELETE", path))

    def _send(
        self, method: str, path: str, body: bytes | None = None, kind: str = ""
    ) -> Generator[bytes]:
        headers = self._headers | ({"Content-Type": kind} if kind else {})
        request = urllib.request.Request(  # noqa: S310 - `ClusterAddress` is http or https
            self.url + path, data=body, headers=headers, method=method
        )
        began = self._clock()
        with self._errors(), self._opener.open(request, timeout=self._timeout_s) as answer:
            while block := answer.read1(_BLOCK_BYTES):
                if self._clock() - began > LONGEST_S:
                    raise TimeoutError(f"an answer is not whole after {LONGEST_S:.0f} s")
                yield block

    def _whole(self, blocks: Generator[bytes]) -> bytes:
        data = bytearray()
        for block in blocks:
            data += block
            if len(data) > MAX_BYTES:
                raise InfrastructureError(
                    f"{self.url}: an answer is larger than {MAX_BYTES / 2**20:.0f} MiB."
                )
        return bytes(data)

    def _read_json(self, data: bytes) -> Any:  # noqa: ANN401 - JSON
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InfrastructureError(
                f"{self.url}: the answer is not JSON.",
                hint=self._port_hint() or _NO_DASHBOARD,
            ) from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # of an odd host
            reason = getattr(error, "reason", None) or error
            said = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            if isinstance(error, http.client.BadStatusLine):  # its text is what came instead
                said = "what it sends is no HTTP"
            raise InfrastructureError(
                f"{self.url}: the cluster does not answer: {said}.",
                hint=self._port_hint() or _NO_HEAD,
            ) from error

    def _port_hint(self) -> str:
        """Say that a port is none of a dashboard, where Ray has it for something else."""
        port = self.url.rpartition(":")[2]
        if port not in RAYS_OWN_PORTS:
            return ""
        return f"{port} is a port of Ray itself; its dashboard has {DASHBOARD_PORT} by default."

    def _refused(self, error: urllib.error.HTTPError) -> InfrastructureError | UsageError:
        if error.code in {_UNAUTHORIZED, _FORBIDDEN}:
            what = "another token than ours" if self._has_token else "a token, and there is none"
            return UsageError(
                f"{self.url}: the cluster wants {what} (HTTP {error.code}).",
                hint="Name the file with the cluster's token in RAY_AUTH_TOKEN_PATH.",
            )
        said = _last_line(error)
        if _NO_AGENT.search(said):
            return AgentUnreachableError(
                f"{self.url}: the dashboard cannot reach the agent of the study's node.",
                hint="A second Ray on one machine needs `ray start "
                "--dashboard-agent-listen-port 52366` (the first has 52365): start that node "
                "anew, then submit again.",
            )
        if error.code == _NOT_FOUND:
            return NotThereError(f"{self.url}: not found: {said}.")
        return InfrastructureError(f"{self.url}: HTTP {error.code}: {said}.")


def _last_line(error: urllib.error.HTTPError) -> str:
    """Return what a cluster says; of a traceback the last line, which names the error."""
    try:
        text = error.read(2**16).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        text = ""
    line = text.splitlines()[-1] if text else error.reason or "no reason given"
    return str(line)[:_MAX_WORDS].rstrip(".")
