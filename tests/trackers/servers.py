"""Servers for the tests of the trackers: a real MLflow, and one that never answers."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_ADDRESS = re.compile(r"running on (http://127\.0\.0\.1:\d+)(?=\s)")
SERVER_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


class MlflowServer:
    """A server of the test's own, with SQLite, on a port that the system chose.

    Attributes:
        uri: Its address.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        log = folder / f"server-{time.monotonic_ns()}.log"
        words = [
            *("server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{folder}/mlflow.db"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own words
                [sys.executable, "-P", "-m", "mlflow", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **SERVER_VARIABLES},
                start_new_session=True,
            )
        self.uri = self._address(log)

    def _address(self, log: Path) -> str:
        while self._process.poll() is None:  # the net is pytest's own time-out
            found = _ADDRESS.search(log.read_text())
            if found:
                return found[1]
            time.sleep(0.1)
        raise AssertionError(log.read_text())

    def stop(self) -> None:
        """End the server and its workers at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """Listen on a port of the system's choice, and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
