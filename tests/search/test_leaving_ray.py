"""A study may end at any moment of Ray's start: its process must end well all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]

LEAVES = """\
import contextlib
import threading
import time

import ray

from stability_search.interruption import Interrupted
from stability_search.search.driver import Cluster

begun, joined = threading.Event(), threading.Event()
join = ray.init


def slow(**kwargs):
    begun.set()
    time.sleep(1.5)
    join(**kwargs)
    joined.set()


ray.init = slow
with contextlib.suppress(Interrupted), Cluster(None) as cluster:
    cluster.start()
    {wait}
is_joined = joined.is_set()
cluster._thread.join(60)  # a program goes on, and ends in the middle of no import
print(is_joined, begun.is_set(), ray.is_initialized())
"""


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        pytest.param("begun.wait()", "True True False\n", id="the join is waited for"),
        pytest.param(
            "begun.wait(); raise Interrupted(15)",
            "False True True\n",
            id="a signal waits for no join, which takes no harm",
        ),
        pytest.param("pass", "False False False\n", id="no join begins"),
    ],
)
def test_leaving_takes_no_ray_from_under_a_join(tmp_path: Path, wait: str, expected: str) -> None:
    # Ray ends a process with exit code 1, a minute later, whose Ray dies while it joins.
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES.format(wait=wait))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}

    finished = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )

    assert (finished.returncode, finished.stdout) == (0, expected), finished.stderr
