"""A process that holds a Ray of this machine for as long as its driver lives.

    python -m stability_search.search.ray_host FD SETTINGS

`ray.init` starts Ray's processes for seconds and ties them to the thread that called it. Here the
driver goes on meanwhile, joins when it is told the address, and can end all of it at any moment.
"""

import json
import socket
import sys

from stability_search.search.remains import end_with_parent


def main(arguments: list[str]) -> None:
    """Start Ray, say where it is, and end it when the driver is gone.

    Args:
        arguments: Descriptor of the socket to the driver, and arguments of `ray.init` as JSON.
    """
    driver = socket.socket(fileno=int(arguments[0]))
    end_with_parent()  # a driver that is killed does not wait until Ray has started
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
