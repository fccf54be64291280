"""How often `diagnose` names the planted cause, and whether it blames healthy trainings.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_diagnose [--seeds 5] [--only NAME]

Every case of tests/diagnose/cases.py with every seed, in this process; then the command's own
work on search_spaces/teacher.yaml, by the clock. Budgets: the planted cause named in 90 % of the
first table, nothing blamed on a healthy training, 120 s for the teacher on two idle cores.
"""

import argparse
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from stability_search import space as spaces
from stability_search.diagnose import Cause, diagnose
from tests.diagnose.cases import HEALTHY, MORE_PLANTED, PLANTED, Case, judge

REQUIRED = 0.9
TEACHER_S = 120.0
ORDER = [cause for cause in Cause if cause is not Cause.INCOMPLETE]

Found = dict[str, Counter[Cause]]


def play(cases: Mapping[str, Case], seeds: int) -> Found:
    """Diagnose every case with every seed."""
    found: Found = {}
    for name, case in cases.items():
        found[name] = Counter()
        for seed in range(seeds):
            started = time.perf_counter()
            verdict, ladder = judge(case, seed)
            found[name][verdict.cause] += 1
            took = time.perf_counter() - started
            trials = sum(len(result.ends) for result in ladder.results.values())
            print(
                f"{name}, seed {seed}: {verdict.cause.value}; {verdict.remedy or 'no remedy'}; "
                f"{trials} trials, {took:.0f} s; {verdict.sureness}",
                file=sys.stderr,
                flush=True,
            )
    return found


def confusion(cases: Mapping[str, Case], found: Found) -> list[str]:
    """Return the table: a row per case, a column per verdict."""
    lines = [
        f"| planted | case | {' | '.join(cause.value for cause in ORDER)} |",
        f"|---|---|{'---|' * len(ORDER)}",
    ]
    for name, counted in found.items():
        cells = " | ".join(str(counted[cause] or "") for cause in ORDER)
        lines.append(f"| {cases[name].cause.value} | {cases[name].title} | {cells} |")
    return lines


def num_right(cases: Mapping[str, Case], found: Found) -> tuple[int, int]:
    """Return how many were named right, of how many."""
    right = sum(counted[cases[name].cause] for name, counted in found.items())
    return right, sum(counted.total() for counted in found.values())


def teacher_seconds() -> tuple[float, str]:
    """Return what the command's work on the teacher's space file takes, and what it says."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        end = diagnose(spaces.load("teacher"), output=Path(folder) / "teacher")
        return time.perf_counter() - started, end.diagnosis.verdict.headline


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Plant causes and see what diagnose names.")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each case, from 0")
    every = {**PLANTED, **MORE_PLANTED, **HEALTHY}
    parser.add_argument("--only", choices=every, action="append", help="leave out the others")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for title, cases in (
        ("One case per cause", PLANTED),
        ("More of them", MORE_PLANTED),
        ("Healthy", HEALTHY),
    ):
        chosen = {name: case for name, case in cases.items() if name in (given.only or every)}
        if not chosen:
            continue
        found = play(chosen, given.seeds)
        right, total = num_right(chosen, found)
        print(f"\n{title}: {right} of {total} named right ({right / total:.0%})\n")
        print(*confusion(chosen, found), sep="\n", flush=True)
    if not given.only:
        took, headline = teacher_seconds()
        print(f"\nteacher.yaml: {took:.0f} s (budget {TEACHER_S:.0f} s). {headline}")
    print(
        f"\n{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


if __name__ == "__main__":
    main()
