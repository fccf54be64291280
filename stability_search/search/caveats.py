"""What the rows say beside a verdict; what settings and device say, the report adds."""

from collections.abc import Iterable, Sequence

from stability_search.records import TrialRow
from stability_search.search.choice import MIN_SEEDS

NOT_OBSERVED = "not fully observed"  # how a trial's own warnings mark it


def _in_words(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"


def few_seeds(num_seeds: int) -> tuple[str, ...]:
    """Warn where even seeds that all agree prove nothing.

    Args:
        num_seeds: Seeds that the verdict rests on, >= 0.
    """
    if num_seeds >= MIN_SEEDS:
        return ()
    return (f"{_in_words(num_seeds, 'seed')}: not enough seeds to name a winner.",)


def unobserved(rows: Iterable[TrialRow]) -> tuple[str, ...]:
    """Warn of trials in which a hook of ours failed.

    Args:
        rows: All finished trials.
    """
    count = sum(any(NOT_OBSERVED in said for said in row.summary.warnings) for row in rows)
    return (f"{_in_words(count, 'trial')} {NOT_OBSERVED}.",) if count else ()


def joined(parts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Join warnings, each once, in the order in which they first appear."""
    return tuple(dict.fromkeys(sentence for part in parts for sentence in part))
