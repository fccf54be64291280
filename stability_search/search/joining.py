"""Whether a Ray cluster can be joined from here, told in words of its own and at once.

Ray itself asks for a minute whether anybody answers, and says of a missing token only that it
failed to connect.
"""

import socket

from stability_search.errors import InfrastructureError

_CONNECT_S = 5.0
_MAX_WORDS = 300  # of what Ray says
_NO_RAY = "Could not find any running Ray instance"
_OF_TOKENS = "authentication token"
_NONE_HERE, _NONE_SENT = "no authentication token was found", "RAY_AUTH_MODE is currently"
_TRACEBACK = "Traceback (most recent call last)"


def refuse_unreachable(address: str) -> None:
    """Refuse an address at which nothing listens.

    Args:
        address: `HOST:PORT` of a cluster's head; `auto` is left to Ray.

    Raises:
        InfrastructureError: Nothing answers there within 5 s.
    """
    host, _, port = address.rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise InfrastructureError(
            f"{address}: the cluster does not answer: {said}.",
            hint="Start its head, or mend the way to it: the name, the port.",
        ) from error


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
        return InfrastructureError(
            f"{address}: it cannot be joined: {_token_problem(said)}.",
            hint="Set RAY_AUTH_MODE=token here, too, and name a copy of the cluster's token, mode "
            "600, in RAY_AUTH_TOKEN_PATH; it is what `ray get-auth-token` prints on the head.",
        )
    if _TRACEBACK in said:
        said = said.strip().rpartition("\n")[2]  # what was raised
    words = " ".join(said.split())[:_MAX_WORDS].rstrip(".")
    return InfrastructureError(
        f"{address}: it cannot be joined: {words}.",
        hint="Every machine needs the same versions of Ray and Python; `stability-search doctor "
        "--address http://HEAD:8265` tells what can be seen from outside.",
    )


def _token_problem(said: str) -> str:
    if _NONE_HERE in said:
        return "RAY_AUTH_MODE is token, and there is no token here"
    if _NONE_SENT in said:
        return "it asks for a token, and none was sent"
    return "it asks for another token than the one here"
