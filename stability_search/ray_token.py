"""The token by which a Ray cluster knows who may use it, where Ray itself looks for one."""

from collections.abc import Mapping
from pathlib import Path

from stability_search.errors import UsageError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
TOKEN_FILE = ".ray/auth_token"  # noqa: S105 - a path


def is_sent(environment: Mapping[str, str]) -> bool:
    """Return True if Ray sends a token when it joins a cluster.

    Args:
        environment: `RAY_AUTH_MODE` is read; once `auto` was joined, Ray has set it as it is.
    """
    return environment.get(MODE, "").lower() == "token"


def read_token(environment: Mapping[str, str], home: Path) -> str:
    """Return the token that Ray would send; empty where there is none.

    Args:
        environment: `RAY_AUTH_MODE`, `RAY_AUTH_TOKEN` and `RAY_AUTH_TOKEN_PATH` are read as Ray
            reads them.
        home: Folder whose `.ray/auth_token` is Ray's own place for a token.

    Raises:
        UsageError: One must be there and is not, or it cannot be sent. It is not repeated.
    """
    mode = environment.get(MODE, "").lower()
    if mode == "disabled":
        return ""
    token = environment.get(TOKEN, "").strip() or _token_of_file(environment, home)
    if mode == "token" and not token:
        raise UsageError(
            f"{MODE}=token needs a token, but none was found.",
            hint=f"Set {TOKEN_PATH} to a file that holds it, or write it to "
            f"~/{TOKEN_FILE} (mode 600).",
        )
    if not token.isascii() or not token.isprintable():  # it becomes a header
        raise UsageError(
            "the token must be one line of plain ASCII, but got something else.",
            hint=f"Look into {TOKEN}, {TOKEN_PATH} and ~/{TOKEN_FILE}.",
        )
    return token


def _token_of_file(environment: Mapping[str, str], home: Path) -> str:
    named = environment.get(TOKEN_PATH, "")
    path = Path(named).expanduser() if named else home / TOKEN_FILE
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return ""
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UsageError(
            f"{TOKEN_PATH}: {path} cannot be read: {reason}.", hint="Name a file with the token."
        ) from error
