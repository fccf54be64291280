"""What the patches cost: an import over torch's own, and a step over the same step without them.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/bench_instrument.py

The import is measured in fresh processes, in turns: `import torch` alone, and with
`import stability_search.instrument`. A step trains the transformer of bench_cases.py (two layers
of width 128) from a DataLoader, as a script does: forward, backward, optional clipping, step. One
model takes a step with the patches, its twin the same step without, the order alternates, and
each round builds both anew. Between two steps the patches are taken out and put in by hand, which
no clock sees. fp16 is the CPU's own on both sides, with PyTorch's GradScaler.

Budgets: 0.5 s for the import, 2 % for a step: the median of the paired ratios of processor time
(`cpu`), which another program's turn on the core does not lengthen.
"""

import argparse
import contextlib
import gc
import io
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils.data import DataLoader, IterableDataset

from stability_search.patches import PatchSettings, install, uninstall
from stability_search.patches.installing import _Process
from tests.benchmarks.bench_cases import (
    CASES,
    CLIP_NORM,
    DTYPES,
    LEARNING_RATE,
    Case,
    seed_dropout,
)
from tests.benchmarks.bench_ratios import Pairs, Seconds, clock, since

IMPORT_BUDGET_S = 0.5
STEP_BUDGET = 1.02
WARM_UP = 10  # steps of a round that make states and caches
IMPORTS = {"torch": "import torch", "patched": "import stability_search.instrument, torch"}


class Windows(IterableDataset):
    """The windows of a case as a data set."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def __iter__(self) -> Iterator[object]:
        return self._case.windows()


def script_step(case: Case, precision: str, *, is_clipped: bool) -> Callable[[], None]:
    """Build a model and return its step, as a script has it."""
    model = case.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=precision == "fp16")
    dtype, is_low = DTYPES[precision], precision != "fp32"
    batches = iter(DataLoader(Windows(case), batch_size=None))

    def step() -> None:
        window = next(batches)
        optimizer.zero_grad()
        for batch in window:
            with torch.autocast("cpu", dtype=dtype if is_low else torch.bfloat16, enabled=is_low):
                loss = case.loss_fn(model, batch)
            scaler.scale(loss / len(window)).backward()
        if is_clipped:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()

    return step


class Switch:
    """The patches of this process, in or out, their memory kept."""

    def __init__(self) -> None:
        installed = _Process.installed
        assert installed is not None
        self._replaced = list(installed.replacements._done)  # noqa: SLF001 - no other needs it
        self._hooks = [
            (table, dict(table))
            for table in (
                optimizers._global_optimizer_pre_hooks,  # noqa: SLF001 - as above
                optimizers._global_optimizer_post_hooks,  # noqa: SLF001 - as above
            )
        ]

    def turn(self, *, is_on: bool) -> None:
        """Put the patches in or take them out."""
        for owner, name, original, ours in self._replaced:
            setattr(owner, name, ours if is_on else original)
        for table, hooks in self._hooks:
            table.clear()
            table.update(hooks if is_on else {})


def measure(case: Case, precision: str, size: tuple[int, int], *, is_clipped: bool) -> Pairs:
    """Return the seconds of plain and patched steps."""
    pairs, (num_rounds, num_steps) = Pairs(), size
    for turn in range(num_rounds):
        install(PatchSettings())
        switch = Switch()
        steps = {}
        for is_on in (True, False) if turn % 2 else (False, True):
            switch.turn(is_on=is_on)
            steps[is_on] = script_step(case, precision, is_clipped=is_clipped)
        found: dict[bool, list[Seconds]] = {True: [], False: []}
        gc.collect()
        for number in range(WARM_UP + num_steps):
            for is_on in (True, False) if number % 2 else (False, True):
                switch.turn(is_on=is_on)
                seed_dropout(number)
                started = clock()
                steps[is_on]()
                found[is_on].append(since(started))
        switch.turn(is_on=True)
        uninstall()
        pairs.add(found[False][WARM_UP:], found[True][WARM_UP:])
    return pairs


def compare_imports(num_rounds: int) -> bool:
    """Print what the import adds; return True if that is within its budget."""
    found: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(num_rounds + 1):
        for name in list(IMPORTS) if number % 2 else list(IMPORTS)[::-1]:
            started = time.perf_counter()
            subprocess.run(  # noqa: S603 - our own words
                [sys.executable, "-c", IMPORTS[name]], check=True, stderr=subprocess.DEVNULL
            )
            if number:  # the first of each fills the disk's cache
                found[name].append(time.perf_counter() - started)
    added = statistics.median(
        ours - torchs for torchs, ours in zip(found["torch"], found["patched"], strict=True)
    )
    verdict = "within" if added <= IMPORT_BUDGET_S else "OVER"
    print(
        f"import: torch {statistics.median(found['torch']):.2f} s, with the patches "
        f"{statistics.median(found['patched']):.2f} s, {added:+.2f} s "
        f"({verdict} the budget of {IMPORT_BUDGET_S} s)"
    )
    return added <= IMPORT_BUDGET_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=60, help="steps of a round that count")
    parser.add_argument("--rounds", type=int, default=4, help="each with fresh models")
    parser.add_argument("--imports", type=int, default=5, help="pairs of fresh processes")
    parser.add_argument("--case", choices=CASES, action="append", help="default: transformer")
    parser.add_argument("--precision", choices=DTYPES, action="append", help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, {platform.machine()}, 1 thread, "
        f"{datetime.now(UTC):%Y-%m-%d}; ratios to the step without [95 % interval]"
    )
    over = [] if compare_imports(arguments.imports) else ["import"]
    size = arguments.rounds, arguments.steps
    for name in arguments.case or ["transformer"]:
        for precision in arguments.precision or DTYPES:
            for is_clipped in (True, False):
                with contextlib.redirect_stderr(io.StringIO()):
                    pairs = measure(CASES[name](), precision, size, is_clipped=is_clipped)
                what = f"{name} {precision} {'clipped' if is_clipped else 'unclipped'}"
                ratio = statistics.median(ratio for row in pairs.ratios(1) for ratio in row)
                verdict = "within" if ratio <= STEP_BUDGET else "OVER"
                print(
                    f"{what:32s} {pairs.plain_s * 1e3:6.2f} ms  {pairs.spell()}  ({verdict})",
                    flush=True,
                )
                if verdict == "OVER":
                    over.append(what)
    if over:
        raise SystemExit(f"\nover the budget: {', '.join(over)}")


if __name__ == "__main__":
    main()
