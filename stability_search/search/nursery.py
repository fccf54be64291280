"""A process that loads torch once and then forks workers, which are ready at once.

    python -m stability_search.search.nursery FD SETTINGS

It is started without Ray and ends with its driver, and its workers end with it.
"""

import json
import os
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection

from stability_search.interruption import end_with_parent, has_hung_up
from stability_search.search.worker import ReportKind, Worker, WorkerSettings, load_torch


def main(arguments: list[str]) -> None:
    """Fork a worker for every connection that arrives, until the driver is gone.

    Args:
        arguments: Descriptor of the socket to the driver, and `WorkerSettings` as JSON text.
    """
    driver = socket.socket(fileno=int(arguments[0]))
    settings = WorkerSettings(**json.loads(arguments[1]))
    end_with_parent()
    if has_hung_up(driver):
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which decides
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers: no zombies
    load_torch()
    nursery = os.getpid()
    while True:
        descriptor = _receive(driver)
        if descriptor is None:
            return
        if os.fork() == 0:
            driver.close()
            _be_worker(Connection(descriptor), settings, nursery)
        os.close(descriptor)


def _receive(driver: socket.socket) -> int | None:
    try:
        message, descriptors, _, _ = socket.recv_fds(driver, 1, 1)
    except OSError:
        return None
    return descriptors[0] if message and descriptors else None


def _be_worker(connection: Connection, settings: WorkerSettings, nursery: int) -> None:
    """Run trials until the driver hangs up or this process is not clean any more."""
    end_with_parent(nursery)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a data loader waits for its workers
    try:
        worker = Worker(settings)
        while worker.is_clean and os.getppid() == nursery:
            _run_trial(worker, connection)
    except (EOFError, ConnectionError):  # the driver has hung up
        pass
    except Exception:  # noqa: BLE001 - into the log; the driver hears that the worker is gone
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # nothing of the nursery's is to be closed a second time


def _run_trial(worker: Worker, connection: Connection) -> None:
    worker.take(connection.recv())
    while True:
        report = worker.next_report()
        connection.send((report.kind.value, report.payload, os.getpid(), worker.is_clean))
        if report.kind is ReportKind.ENDED:
            return


if __name__ == "__main__":
    main(sys.argv[1:])
