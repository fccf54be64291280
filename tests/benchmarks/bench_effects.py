"""How often the 95 % intervals of the report's effects hold the truth, by simulation.

    python -m tests.benchmarks.bench_effects

Configurations are drawn at random and are stable with a chance that their settings give by a
logistic model; the truth of a value is that chance, averaged over all configurations with the
value put in. Levels of settings with few values are counted; a coverage below 95 % means that
intervals are too narrow.
"""

import math
from collections.abc import Mapping
from typing import Any

from stability_search.report.effects import Configuration, estimate
from tests.report.test_effects import NAMES, planted

COUNTS = (40, 120, 480)
NUM_STUDIES = 300


def chance(settings: Mapping[str, Any]) -> float:
    """Return how likely a configuration is stable: a high rate, fp16 and no cap are bad."""
    odds = 1.0 - 1.5 * (math.log10(settings["learning_rate"]) + 2.5)
    odds -= 1.2 * (settings["precision"] == "fp16") + 0.8 * (settings["cap"] is None)
    odds += 0.3 * (settings["clip_norm"] is not None)
    return 1 / (1 + math.exp(-odds))


def truth(configurations: list[Configuration], name: str, text: str) -> float:
    """Return the chance of a stable end with one value put into every configuration."""
    value = next(
        one.settings[name]
        for one in configurations
        if text == ("off" if one.settings[name] is None else _text(one.settings[name]))
    )
    put = [chance({**one.settings, name: value}) for one in configurations]
    return math.fsum(put) / len(put)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def coverage(count: int) -> tuple[int, int]:
    """Return how many intervals held the truth, and how many there were."""
    held = total = 0
    for seed in range(NUM_STUDIES):
        configurations = planted(chance, count=count, seed=seed)
        for effect in estimate(configurations, NAMES).effects:
            for level in effect.levels:
                if level.number is not None:
                    continue
                true = truth(configurations, effect.name, level.text)
                held += level.share.low <= true <= level.share.high
                total += 1
    return held, total


def main() -> None:
    """Print the coverage, a line per size of study."""
    for count in COUNTS:
        held, total = coverage(count)
        print(f"{count} configurations: {held} of {total} intervals, {held / total:.1%}")


if __name__ == "__main__":
    main()
