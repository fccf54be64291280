"""Every fault scenario with several seeds, as a table.

    python -m tests.scenarios.table [--seeds 5] [--only edge]

A scenario holds with a seed if the guard named for it showed, did not show without the fault,
and every fix named for it, applied by hand, survived. The last line is the share that holds.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from tests.scenarios import (
    adam_eps,
    attention_growth,
    ctc_targets,
    divergence,
    edge,
    fp16_attention,
    loss_scale,
)
from tests.scenarios.running import Evidence

REQUIRED = 0.9  # share of scenario x seed that must hold


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A fault with the guard that must show.

    Attributes:
        title: What goes wrong.
        guard: What must show it.
        play: Trains it with a seed.
    """

    title: str
    guard: str
    play: Callable[[int], Evidence]


SCENARIOS: Mapping[str, Scenario] = {
    "attention_growth": Scenario(
        title="attention logits grow (LR 2^-4, 2^-2)",
        guard="no NaN; low P, margin 0; alarm of the logits",
        play=attention_growth.scenario,
    ),
    "edge": Scenario(
        title="the edge: lowest training loss, dies later",
        guard="S does not pick it",
        play=edge.scenario,
    ),
    "divergence": Scenario(
        title="LR far too high, no NaN (2^0, 2^2, 2^4)",
        guard="`diverged` at step 70",
        play=divergence.scenario,
    ),
    "loss_scale": Scenario(
        title="init_scale 2^24 / 2^32 / 2^40",
        guard="only `calibration`, no kill",
        play=loss_scale.scenario,
    ),
    "fp16_attention": Scenario(
        title="fp16 overflow of the attention logits",
        guard="forward pass non-finite: `bad`, also with a clamp",
        play=fp16_attention.scenario,
    ),
    "ctc_targets": Scenario(
        title="CTC target longer than its input",
        guard="`data`, nothing blamed",
        play=ctc_targets.scenario,
    ),
    "adam_eps": Scenario(
        title="Adam eps 1e-8 in pure fp16",
        guard="`nonfinite_parameters` at step 1",
        play=adam_eps.scenario,
    ),
}


def play(names: Iterable[str], seeds: Sequence[int]) -> dict[str, list[Evidence]]:
    """Play scenarios with every seed, on one thread: the models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: [_play(name, seed) for seed in seeds] for name in names}
    finally:
        torch.set_num_threads(before)


def _play(name: str, seed: int) -> Evidence:
    started = time.perf_counter()
    evidence = SCENARIOS[name].play(seed)
    took = time.perf_counter() - started
    print(f"{name}, seed {seed}: {evidence.figures} ({took:.0f} s)", file=sys.stderr, flush=True)
    return evidence


def share(found: Mapping[str, Sequence[Evidence]]) -> float:
    """Return the share of scenario x seed that holds, in [0, 1]."""
    every = [evidence for of_scenario in found.values() for evidence in of_scenario]
    return sum(evidence.holds for evidence in every) / len(every)


def markdown(found: Mapping[str, Sequence[Evidence]]) -> str:
    """Write the table; figures are those of the first seed."""
    lines = [
        "| scenario | guard named | shown | absent without fault | fix: survives | first seed |",
        "|---|---|---|---|---|---|",
    ]
    for name, evidence in found.items():
        scenario, count = SCENARIOS[name], len(evidence)
        fixes = "; ".join(
            f"{fix}: {sum(one.fixes[fix] for one in evidence)}/{count}"
            for fix in evidence[0].fixes
        )
        shown = sum(one.is_guard_shown for one in evidence)
        absent = sum(one.is_sign_absent for one in evidence)
        lines.append(
            f"| {scenario.title} | {scenario.guard} | {shown}/{count} | {absent}/{count} "
            f"| {fixes} | {evidence[0].figures} |"
        )
    return "\n".join(lines)


def missed(found: Mapping[str, Sequence[Evidence]]) -> list[str]:
    """List what did not hold, a line each."""
    return [
        f"{name}, seed {one.seed}: guard shown {one.is_guard_shown}, absent without the fault "
        f"{one.is_sign_absent}, fixes {dict(one.fixes)}; {one.figures}"
        for name, of_scenario in found.items()
        for one in of_scenario
        if not one.holds
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Play every fault scenario with several seeds.")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each scenario, from 0")
    parser.add_argument("--only", choices=SCENARIOS, action="append", help="leave out the others")
    given = parser.parse_args()
    started = time.perf_counter()
    found = play(given.only or SCENARIOS, range(given.seeds))
    every = sum(map(len, found.values()))
    print(markdown(found))
    print()
    for line in missed(found):
        print(f"missed: {line}")
    print(
        f"holds: {share(found):.1%} of {every} (scenario x seed), required {REQUIRED:.0%}; "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
