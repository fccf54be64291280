"""Whether a Ray cluster can be joined from here, told in words of its own and at once.

Ray itself asks for a minute whether anybody answers, and for twenty seconds whether another token
is wanted, and says of a missing one only that it failed to connect.
"""

import os
import socket
from enum import Enum
from pathlib import Path

from stability_search import ray_token
from stability_search.errors import InfrastructureError, UsageError

ANSWER_S = 5.0  # so long a head has to take a connection, and to answer
_CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # takes an empty message; asks for a token
_MAX_WORDS = 300  # of what Ray says
_NO_RAY = "Could not find any running Ray instance"
_OF_TOKENS = "authentication token"
_NONE_HERE, _NONE_SENT = "no authentication token was found", "RAY_AUTH_MODE is currently"
_NOT_SENT = "it asks for a token, and none was sent"
_ANOTHER = "it asks for another token than the one here"
_TRACEBACK = "Traceback (most recent call last)"


def refuse_unusable(address: str) -> None:
    """Refuse an address at which no head of a cluster answers and would let this process in.

    Args:
        address: `HOST:PORT` of the head; `auto` is left to Ray.

    Raises:
        InfrastructureError: Nothing listens there, no head answers within 5 s, or it wants
            another token, or one that is not there.
    """
    host, _, port = address.rpartition(":")
    if not host:
        return
    _connect(host, port)
    _ask(address)


class Reach(Enum):
    """How much of a head can be reached."""

    ANSWERS = "it answers"
    HANGS = "it takes connections and says nothing"
    GONE = "it takes no connection"


def reach(address: str) -> Reach:
    """Return whether the head at `HOST:PORT` takes connections, and answers.

    Whether it lets this process in, and what else it says, does not matter here.
    """
    host, _, port = address.rpartition(":")
    try:
        _connect(host, port)
    except InfrastructureError:
        return Reach.GONE
    try:
        _ask(address)
    except _SilentError:
        return Reach.HANGS
    except InfrastructureError:
        pass
    return Reach.ANSWERS


class _SilentError(InfrastructureError):
    """A head that takes connections did not answer in time."""


def _connect(host: str, port: str) -> None:
    """Connect to a port and leave again."""
    address = f"{host}:{port}"
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise InfrastructureError(
            f"{address}: the cluster does not answer: {said}.",
            hint="Start its head, or mend the way to it: the name, the port.",
        ) from error


def _ask(address: str) -> None:
    """Ask the head as Ray would whether it is alive, without Ray.

    Ray's own client ends the process that it is in a minute after a head has gone.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() not in {"0", "false"}:
        return  # left to Ray, which has the certificates
    import grpc

    is_sent = ray_token.is_sent(os.environ)
    try:
        token = ray_token.read_token(os.environ, Path.home()) if is_sent else ""
    except UsageError as error:
        raise _closed(address, error.message.rstrip(".")) from error
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    host, _, port = address.rpartition(":")
    target = f"[{host.strip('[]')}]:{port}" if ":" in host else address
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_CHECK_ALIVE)(b"", timeout=ANSWER_S, metadata=metadata)
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
        else:
            return
    if code is grpc.StatusCode.UNAUTHENTICATED:
        raise _closed(address, _ANOTHER if is_sent else _NOT_SENT)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        raise _SilentError(
            f"{address}: the cluster takes connections, but does not answer within "
            f"{ANSWER_S:g} s.",
            hint="Look at its head: it may be overloaded, stopped, or no head at all.",
        )
    raise InfrastructureError(
        f"{address}: the head of a Ray cluster is needed, but something else answers: "
        f"{_short(str(details))}.",
        hint="Give the port that `ray start --head` prints, usually 6379.",
    )


def cannot_join(address: str, said: str) -> InfrastructureError:
    """Return the error for a cluster that Ray did not join.

    Args:
        address: `auto`, or `HOST:PORT`.
        said: What Ray says.
    """
    if address == "auto" and _NO_RAY in said:
        return InfrastructureError(
            "auto: no Ray runs on this machine, or it is another user's.",
            hint="Give HOST:PORT of the cluster's head, or start a node here by `ray start`.",
        )
    if _OF_TOKENS in said.lower():
        return _closed(address, _token_problem(said))
    if _TRACEBACK in said:
        said = said.strip().rpartition("\n")[2]  # what was raised
    return InfrastructureError(
        f"{address}: it cannot be joined: {_short(said)}.",
        hint="Every machine needs the same versions of Ray and Python; `stability-search doctor "
        "--address http://HEAD:8265` tells what can be seen from outside.",
    )


def _closed(address: str, problem: str) -> InfrastructureError:
    return InfrastructureError(
        f"{address}: it cannot be joined: {problem}.",
        hint="Set RAY_AUTH_MODE=token here, too, and name a copy of the cluster's token, mode "
        "600, in RAY_AUTH_TOKEN_PATH; it is what `ray get-auth-token` prints on the head.",
    )


def _token_problem(said: str) -> str:
    if _NONE_HERE in said:
        return "RAY_AUTH_MODE is token, and there is no token here"
    return _NOT_SENT if _NONE_SENT in said else _ANOTHER


def _short(said: str) -> str:
    return " ".join(said.split())[:_MAX_WORDS].rstrip(".")
