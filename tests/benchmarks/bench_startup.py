"""Seconds that reading commands take from the shell, against their budgets.

    PYTHONPATH=. python tests/benchmarks/bench_startup.py [--repeat 5]

Each is a fresh process; the fastest and the median of the repeats are printed, since other
programs only ever add, and the least CPU time, which they change less. The run is
of 200 trials whose results are made up.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from stability_search import space as spaces
from stability_search.search import run_directory
from stability_search.search.closing import keep_verdict
from stability_search.search.ledger import Ledger
from stability_search.search.plan import StudyPlan
from stability_search.search.reopening import parameters_of
from stability_search.step_files import encode_steps, write_steps
from tests.search.inline_study import run_all, write_space

SMALL = ("search.trials=170", "search.sampler=random", "confirm.top=3", "confirm.octaves=2")
ASKED = {
    "_STABILITY_SEARCH_COMPLETE": "complete_bash",
    "COMP_WORDS": "stability-search run --space te",
    "COMP_CWORD": "3",
}


def make_run(folder: Path) -> tuple[Path, int]:
    """Return the directory of a finished study and its number of trials."""
    space = spaces.load(write_space(folder), SMALL)
    facts = run_directory.study_facts(space)
    directory = run_directory.create(folder / "run", space, facts=facts, environment={})
    ledger = Ledger.create(directory.ledger, facts)
    plan = StudyPlan(space, device="cpu")
    rows = run_all(plan)
    for row in rows:
        write_steps(directory.step_file(row.trial_id, row.attempt), encode_steps(()), row)
        ledger.add(row, *parameters_of(space, row))
    if plan.verdict is not None:
        keep_verdict(ledger, plan.verdict)
    ledger.close()
    return directory.path, len(rows)


def cpu_s() -> float:
    """Return the CPU seconds of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_of(
    words: tuple[str, ...], repeat: int, environment: dict[str, str]
) -> tuple[list[float], float]:
    """Time a command in fresh processes: by the clock each, and the least CPU time."""
    program = [sys.executable, "-m", "stability_search", *words]
    taken, used = [], []
    for _ in range(repeat + 1):
        began, used_before = time.perf_counter(), cpu_s()
        subprocess.run(  # noqa: S603 - our own words
            program, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True
        )
        taken.append(time.perf_counter() - began)
        used.append(cpu_s() - used_before)
    return taken[1:], min(used)  # the first reads the disk


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory() as name:
        run, num_rows = make_run(Path(name))
        space = str(Path(name) / "tiny.yaml")
        cases: list[tuple[str, tuple[str, ...], float | None, dict[str, str]]] = [
            ("--help", ("--help",), 0.4, {}),
            ("completion", (), None, ASKED),
            ("validate", ("validate", "--space", space), 0.6, {}),
            ("schema", ("schema",), 0.6, {}),
            (f"status, {num_rows} trials", ("status", str(run)), 0.6, {}),
            (f"report, {num_rows} trials", ("report", str(run)), 3.0, {}),
        ]
        print(f"{datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}", end=", ")
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {repeat} repeats")
        print("| command | fastest | median | CPU | budget |\n|---|---|---|---|---|")
        for label, words, budget, environment in cases:
            taken, used_s = seconds_of(words, repeat, environment)
            limit = "" if budget is None else f"{budget} s"
            clock = f"{min(taken):.2f} s | {statistics.median(taken):.2f} s"
            print(f"| {label} | {clock} | {used_s:.2f} s | {limit} |")


if __name__ == "__main__":
    main()
