"""A process that holds a Ray of this machine for as long as its driver lives.

    python -m stability_search.search.ray_host FD SETTINGS

`ray.init` starts Ray's processes for seconds and ties them to the thread that called it. Here the
driver goes on meanwhile, joins when it is told the address, and can end all of it at any moment.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from stability_search import ray_token
from stability_search.interruption import end_with_parent, has_hung_up


def ensure_private_token(home: Path, environment: Mapping[str, str]) -> None:
    """Write the token that Ray would write, for its owner alone: Ray leaves it to the umask.

    Args:
        home: Folder of Ray's `.ray/auth_token`; one that is there stays as it is.
        environment: What Ray reads; where it asks for no token, or names one, nothing is written.
    """
    names_one = environment.get(ray_token.TOKEN) or environment.get(ray_token.TOKEN_PATH)
    if not ray_token.is_sent(environment) or names_one:
        return
    path = home / ray_token.TOKEN_FILE
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # Ray says what is wrong with the place
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123 - a mode from the start
            file.write(secrets.token_hex(32))
        try:
            path.hardlink_to(part)  # whole, or not at all; never over one that is there
        finally:
            part.unlink()


def main(arguments: list[str]) -> None:
    """Start Ray, say where it is, and end it when the driver is gone.

    Args:
        arguments: Descriptor of the socket to the driver, and arguments of `ray.init` as JSON.
    """
    driver = socket.socket(fileno=int(arguments[0]))
    end_with_parent()  # a driver that is killed does not wait until Ray has started
    if has_hung_up(driver):  # it was killed before
        return
    ensure_private_token(Path.home(), os.environ)
    import ray

    try:
        ray.init(address="local", log_to_driver=False, **json.loads(arguments[1]))
        answer = {"address": ray.get_runtime_context().gcs_address}
    except Exception as error:  # noqa: BLE001 - told to the driver
        answer = {"error": str(error)}
    try:
        driver.sendall(json.dumps(answer).encode() + b"\n")
        driver.recv(1)
    except OSError:  # the driver is gone already
        pass
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
