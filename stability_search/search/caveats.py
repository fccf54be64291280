"""What the rows say beside a verdict; what settings and device say, the report adds."""

from collections.abc import Iterable, Sequence

from stability_search.records.trial import Stage, TrialRow
from stability_search.search.choice import MIN_SEEDS
from stability_search.settings.trial import SETTING_NAMES
from stability_search.space import Space

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


def loss_may_differ(space: Space, rows: Iterable[TrialRow]) -> tuple[str, ...]:
    """Warn where a setting that varies may change what the probe measures.

    A term of the loss that is switched off must not look like progress. Whether a setting of the
    task changes its loss, nobody but its author knows.

    Args:
        space: The study's space.
        rows: All finished trials.
    """
    names = [
        parameter.name
        for parameter in space.parameters
        if parameter.name not in SETTING_NAMES and len(parameter.choices) != 1
    ]
    if not names or all(row.summary.has_probe_loss is not False for row in rows):
        return ()
    go, one = ("goes", "it") if len(names) == 1 else ("go", "one of them")
    sentence = (
        f"{', '.join(names)} {go} to the task, which has no `probe_loss`: if {one} changes the "
        "task's `loss`, probe losses and scores cannot be compared between its values."
    )
    return (sentence,)


def left_out(
    space: Space, rows: Iterable[TrialRow], *, unfinished: Sequence[str]
) -> tuple[str, ...]:
    """Say what a budget left out of search and confirm.

    Args:
        space: The study's space.
        rows: All finished trials.
        unfinished: Candidates whose confirmation did not end.
    """
    said = []
    planned = space.study.search.trials
    done = len({row.index for row in rows if row.stage is Stage.SEARCH})
    if space.has_space and done < planned:
        said.append(
            f"The budget ended the search after {done} of {_in_words(planned, 'trial')}: half of "
            "it is kept for confirm."
        )
    if unfinished:
        names = _in_words(len(unfinished), "candidate")
        said.append(
            f"The budget ended before {names} could be confirmed: {', '.join(unfinished)}."
        )
    return tuple(said)


def joined(parts: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Join warnings, each once, in the order in which they first appear."""
    return tuple(dict.fromkeys(sentence for part in parts for sentence in part))
