"""The field reports: what failed, what the teams made of it, and what a study finds instead.

    python -m tests.benchmarks.field                            all five: about an hour on 2 cores
    python -m tests.benchmarks.field --case detector --write    one, and into tasks/README.md

Each case (`tests/field/cases`) is measured in six rows:

    no guards               the loop that failed, plain PyTorch, 5 seeds
    fix as written          the team's cure, as their script has it, 5 seeds
    fix as meant            the same without the mistakes in it, 5 seeds
    engine, before          the settings that failed under our engine, 5 seeds, `trial.steps`
    engine, after           the team's own settings under our engine, 10 seeds, 5 x `confirm.steps`
    choice of the search    the same for what a study of the shipped space file chose

`survived` counts seeds that reached their last step with finite loss and parameters; under the
engine with the kill rule and the loss stop in force. `learned` counts those whose last probe
level lies below E_0 by at least half of the study's Delta. Seeds are fresh: no study uses them.
`steps lost` were bad or met bad data or, in a plain loop, changed nothing.
Probe losses compare where the steps are as many: the choice's with that of "engine, after".

Studies and guarded trainings are kept in `--store`: a second call runs only what is missing.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.field.measuring import measure
from tests.benchmarks.field.tables import table, write_into
from tests.field.case import FieldCase

CASES = ("teacher_scaler", "teacher", "detector", "speech_lora", "speech_gpt")
README = Path(__file__).resolve().parents[3] / "stability_search" / "tasks" / "README.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases asked for and print their tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.field")
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--store", type=Path, default=Path("reports/field"))
    parser.add_argument("--jobs", type=int, default=2, help="processes for plain loops and trials")
    parser.add_argument("--write", action="store_true", help="put the tables into tasks/README.md")
    options = parser.parse_args(arguments)
    for name in options.case:
        case: FieldCase = importlib.import_module(f"tests.field.cases.{name}").CASE
        text = table(measure(case, options.store / name, jobs=options.jobs))
        print(text, flush=True)
        if options.write:
            write_into(README, name, text)


if __name__ == "__main__":
    sys.exit(main())
