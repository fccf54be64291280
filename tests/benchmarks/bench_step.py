"""What the guards cost: a guarded step against plain PyTorch with clipping.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/bench_step.py [--profile]

Both train the same model on the same windows with fused AdamW: the built-in teacher as
search_spaces/teacher.yaml trains it (clean data), and a two-layer transformer of width 128. A step
of the one follows a step of the other, the order alternates, the first steps do not count, and
each round builds both anew, because where a model lies in memory moves its time. fp16 is the CPU's
own on both sides. Beside it, in the same run: the loops of PyTorch Lightning and of the Hugging
Face Trainer on the same work, each also a step after a plain one, where they are installed
(`pip install -c constraints.txt -e '.[bench]'`).

Read the median of the paired ratios with its 95 % interval: a busy machine widens it. `cpu` is the
same of processor time, which another program's turn on the core does not lengthen; `rounds` are
the smallest and the largest median of a round.
"""

import argparse
import gc
import platform
from datetime import UTC, datetime

import torch

from stability_search.engine import GuardedEngine
from stability_search.settings.engine import EngineSettings
from tests.benchmarks import bench_loops, bench_profile
from tests.benchmarks.bench_cases import (
    CASES,
    CLIP_NORM,
    DTYPES,
    LEARNING_RATE,
    LOSS_SCALE,
    Case,
    Step,
    Window,
    plain_step,
    seed_dropout,
)
from tests.benchmarks.bench_ratios import Pairs, Seconds, clock, since

WARM_UP = 10  # steps of a round that make states and caches


def guarded_step(case: Case, precision: str) -> Step:
    settings = EngineSettings(
        learning_rate=LEARNING_RATE,
        precision=precision,  # type: ignore[arg-type]
        clip_norm=CLIP_NORM,
        init_scale=LOSS_SCALE,
        fp16_on_cpu="native",
    )
    engine = GuardedEngine(case.build(), settings)

    def step(window: Window) -> None:
        record = engine.step(window, case.loss_fn)
        if record.label != "ok":
            raise SystemExit(f"the benchmark must take healthy steps, but: {record.reason}")

    return step


def measure(case: Case, precision: str, num_rounds: int, num_steps: int) -> Pairs:
    """Return the seconds of plain and guarded steps."""
    pairs = Pairs()
    builders = {"plain": plain_step, "guarded": guarded_step}
    for turn in range(num_rounds):
        names = list(builders) if turn % 2 else list(builders)[::-1]
        steps = {name: builders[name](case, precision) for name in names}
        found: dict[str, list[Seconds]] = {name: [] for name in names}
        windows = case.windows()
        gc.collect()
        for number in range(WARM_UP + num_steps):
            window = next(windows)
            for name in names if number % 2 else names[::-1]:
                seed_dropout(number)
                started = clock()
                steps[name](window)
                found[name].append(since(started))
        pairs.add(found["plain"][WARM_UP:], found["guarded"][WARM_UP:])
    return pairs


def compare(case: Case, precision: str, arguments: argparse.Namespace) -> bool:
    """Print the figures of a case; return True if the guarded step is within its budget."""
    size = arguments.rounds, arguments.steps
    pairs = measure(case, precision, *size)
    is_within = pairs.ratio <= case.budget
    verdict = "within" if is_within else "OVER"
    print(f"\n{case.name} {precision}: plain {pairs.plain_s * 1e3:.2f} ms a step")
    print(f"  guarded    {pairs.other_s * 1e3:6.2f} ms  {pairs.spell()}", end="")
    print(f"  ({verdict} the budget of {case.budget})")
    for name, loop in ({} if arguments.no_loops else bench_loops.LOOPS).items():
        try:
            pairs = bench_loops.measure(loop, case, precision, *size)
        except bench_loops.CannotRunError as error:
            print(f"  {name:10s} not measured: {error}")
            continue
        print(f"  {name:10s} {pairs.other_s * 1e3:6.2f} ms  {pairs.spell()}", flush=True)
    return is_within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=60, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=4, help="each with fresh models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--precision", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--no-loops", action="store_true", help="leave the other loops out")
    parser.add_argument(
        "--profile", action="store_true", help="say instead where a guarded step spends its time"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {arguments.threads} thread(s), "
        f"{datetime.now(UTC):%Y-%m-%d}; ratios to the plain step [95 % interval]"
    )
    over = []
    for name in arguments.case or CASES:
        case = CASES[name]()
        for precision in arguments.precision or DTYPES:
            if arguments.profile:
                steps = {"plain": plain_step, "guarded": guarded_step}
                bench_profile.show(case, precision, steps, arguments.steps)
            elif not compare(case, precision, arguments):
                over.append(f"{name} {precision}")
    if over:
        raise SystemExit(f"\nover the budget: {', '.join(over)}")


if __name__ == "__main__":
    main()
