"""Where a guarded step spends its time, and what it brings to the host."""

import cProfile
import pstats
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

import stability_search.engine
from tests.benchmarks.bench_cases import Case, Step, seed_dropout

WARM_UP = 10
NUM_FUNCTIONS = 16
# Reads of a number as the profiler sees them; a fused optimizer's own are left out.
READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
ENGINE = str(Path(stability_search.engine.__file__).parent)

Builders = Mapping[str, Callable[[Case, str], Step]]


def show(case: Case, precision: str, builders: Builders, num_steps: int) -> None:
    """Print the engine's costliest functions and the transfers of a step."""
    steps = {name: build(case, precision) for name, build in builders.items()}
    for step in steps.values():
        run(case, step, WARM_UP)
    transfers = ", ".join(f"{name} {num_transfers(case, step)}" for name, step in steps.items())
    print(f"\n{case.name} {precision}: transfers to the host in a step: {transfers}")
    print("  us a step with the operators it calls itself (also the model's own), calls, function")
    rows = functions(case, steps["guarded"], num_steps)
    for own_us, calls, name in rows[:NUM_FUNCTIONS]:
        print(f"  {own_us:8.1f}  {calls:5.1f}  {name}")
    rest = sum(own_us for own_us, _, _ in rows[NUM_FUNCTIONS:])
    print(f"  {rest:8.1f}         {len(rows[NUM_FUNCTIONS:])} more")


def run(case: Case, step: Step, num_steps: int) -> None:
    windows = case.windows()
    for number in range(num_steps):
        seed_dropout(number)
        step(next(windows))


def functions(case: Case, step: Step, num_steps: int) -> list[tuple[float, float, str]]:
    """Return own microseconds and calls a step of the engine's functions, the costliest first."""
    # Processor time, which adds about 1 us to a call but does not count other programs' turns on
    # the core. Without builtins: an operator counts for the function that called it.
    profiler = cProfile.Profile(time.thread_time, builtins=False)
    profiler.runcall(run, case, step, num_steps)
    entries = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = [
        (own_s * 1e6 / num_steps, calls / num_steps, f"{Path(file).name}:{line} {name}")
        for (file, line, name), (_, calls, own_s, _, _) in entries.items()
        if file.startswith(ENGINE)
    ]
    return sorted(rows, reverse=True)


def num_transfers(case: Case, step: Step) -> int:
    """Count reads in one step: `tolist`, and those the profiler sees outside the optimizer."""
    window = next(case.windows())
    to_list = torch.Tensor.tolist
    lists: list[int] = []

    def counting(tensor: torch.Tensor) -> object:
        lists.append(tensor.numel())
        return to_list(tensor)

    with (
        mock.patch.object(torch.Tensor, "tolist", counting),
        profile(activities=[ProfilerActivity.CPU]) as seen,
    ):
        step(window)
    events = seen.events()
    optimizers = [e.time_range for e in events if e.name.startswith("Optimizer.step")]
    reads = [
        event
        for event in events
        if event.name in READS
        and (event.cpu_parent is None or event.cpu_parent.name not in READS)
        and not any(o.start <= event.time_range.start <= o.end for o in optimizers)
    ]
    return len(lists) + len(reads)
