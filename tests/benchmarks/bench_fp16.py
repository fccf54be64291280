"""What emulated fp16 costs on a CPU: a training step in it against the same step in fp32.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/bench_fp16.py [--case teacher]

Forward, backward and fused AdamW, without guards, of the two-layer transformer of width 128, the
built-in teacher as search_spaces/teacher.yaml trains it (clean data), and a small convolutional
net. A step of the one follows a step of the other, the order alternates, the first steps do not
count, and each round builds both anew. Native fp16 stands beside it, by fewer steps.

Read the median of the paired ratios with its 95 % interval: a busy machine widens it, and slows
many small operators more than few large ones. `cpu` is the same of processor time; `rounds` are
the smallest and the largest median of a round.
"""

import argparse
import contextlib
import gc
import math
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from stability_search.engine import emulation
from tests.benchmarks.bench_cases import (
    LOSS_SCALE,
    Batch,
    Case,
    Window,
    fused_adamw,
    seed_dropout,
    teacher,
    transformer,
)
from tests.benchmarks.bench_ratios import Pairs, Seconds, clock, since

BUDGET = 1.25
WARM_UP = 5  # steps of a round that make states and caches
NATIVE_STEPS = 10  # of one round: a step can take a second


def convolutional() -> Case:
    """Return three blocks of convolution, BatchNorm, ReLU and pooling on 16 images of 32x32."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for narrow, wide in ((3, 32), (32, 64), (64, 64)):
            convolution = nn.Conv2d(narrow, wide, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(model(images).float(), labels)

    def windows() -> Iterator[Window]:
        generator = torch.Generator().manual_seed(1)
        while True:
            images = torch.randn(16, 3, 32, 32, generator=generator)
            yield [(images, torch.randint(10, (16,), generator=generator))]

    return Case(
        name="convolutional",
        budget=BUDGET,
        accumulation=1,
        build=build,
        loss_fn=loss_fn,
        windows=windows,
    )


CASES = {"transformer": transformer, "teacher": teacher, "convolutional": convolutional}


def build_step(case: Case, way: str) -> Callable[[Window], float]:
    """Return a step in `fp32`, `emulated` or `native` fp16, which returns its last loss."""
    model = case.build()
    optimizer = fused_adamw(model)

    def step(window: Window) -> float:
        optimizer.zero_grad()
        with emulation.emulated_fp16() if way == "emulated" else contextlib.nullcontext():
            for batch in window:
                with torch.autocast("cpu", dtype=torch.float16, enabled=way != "fp32"):
                    loss = case.loss_fn(model, batch)
                # Scaled in fp32 too, so that all do the same; AdamW does not see it.
                (loss * (LOSS_SCALE / len(window))).backward()
        optimizer.step()
        return loss.item()

    return step


def measure(case: Case, way: str, num_rounds: int, num_steps: int) -> Pairs:
    """Return the seconds of steps in fp32, the plain ones, and of steps the other way."""
    pairs = Pairs()
    for turn in range(num_rounds):
        names = ["fp32", way] if turn % 2 else [way, "fp32"]
        steps = {name: build_step(case, name) for name in names}
        found: dict[str, list[Seconds]] = {name: [] for name in names}
        windows = case.windows()
        gc.collect()
        for number in range(WARM_UP + num_steps):
            window = next(windows)
            for name in names if number % 2 else names[::-1]:
                seed_dropout(number)
                started = clock()
                loss = steps[name](window)
                found[name].append(since(started))
                if not math.isfinite(loss):
                    raise SystemExit(f"the steps must be healthy, but {name} gave {loss}")
        pairs.add(found["fp32"][WARM_UP:], found[way][WARM_UP:])
    return pairs


def compare(case: Case, num_rounds: int, num_steps: int) -> bool:
    """Print the figures of a case; return True if emulated fp16 is within the budget."""
    emulated = measure(case, "emulated", num_rounds, num_steps)
    native = measure(case, "native", 1, min(num_steps, NATIVE_STEPS))
    is_within = emulated.ratio <= BUDGET
    verdict = "within" if is_within else "OVER"
    print(f"\n{case.name}: fp32 {emulated.plain_s * 1e3:.2f} ms a step")
    print(f"  emulated {emulated.other_s * 1e3:7.2f} ms  {emulated.spell()}", end="")
    print(f"  ({verdict} the budget of {BUDGET})")
    print(f"  native   {native.other_s * 1e3:7.2f} ms  {native.spell()}", flush=True)
    return is_within


def processor() -> str:
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=40, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=4, help="each with fresh models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{arguments.threads} thread(s), {datetime.now(UTC):%Y-%m-%d}; "
        "ratios to fp32 [95 % interval]"
    )
    emulation.acquire()
    try:
        names = arguments.case or CASES
        over = [n for n in names if not compare(CASES[n](), arguments.rounds, arguments.steps)]
    finally:
        emulation.release()
    if over:
        raise SystemExit(f"\nover the budget: {', '.join(over)}")


if __name__ == "__main__":
    main()
