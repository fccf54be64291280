"""What must be said beside a verdict: where it holds less than it seems to."""

from collections.abc import Iterable, Mapping, Sequence

from stability_search.records import Json, TrialRow
from stability_search.search.choice import MIN_SEEDS
from stability_search.settings import EngineSettings, StudySettings

ON_CPU = (
    "fp16 was judged on a CPU: its range and loss scaling carry over to a GPU, fused kernels and "
    "the order of sums do not."
)
IN_FLIGHT = (
    "Sampler tpe with several trials in flight: what it proposes depends on the order in which "
    "they finish, so each trial can be repeated, but not the list of them."
)
NOT_OBSERVED = "not fully observed"  # how a trial's own warnings mark it
_PROVEN_AFTER = 20  # steps without overflow that prove a loss scale


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


def scale_growth(settings: Iterable[Mapping[str, Json]], steps: int) -> tuple[str, ...]:
    """Warn where the loss scale of fp16 trials never had to grow, or was never proven.

    Args:
        settings: Configurations the verdict names.
        steps: The horizon they were confirmed over.
    """
    default = EngineSettings(learning_rate=1.0).growth_interval
    given = (one.get("growth_interval") for one in settings if one.get("precision") == "fp16")
    intervals = sorted({value if isinstance(value, int) else default for value in given})
    said = [
        f"fp16 with growth_interval {interval}: in {steps} steps scale growth was not exercised; "
        "a smaller growth_interval would show it."
        for interval in intervals
        if interval >= steps
    ]
    said += [
        f"fp16 with growth_interval {interval}: below {_PROVEN_AFTER} no loss scale is ever "
        "proven, so every overflow counts as calibration."
        for interval in intervals
        if interval < _PROVEN_AFTER
    ]
    return tuple(said)


def half_precision_on_cpu(rows: Iterable[TrialRow]) -> tuple[str, ...]:
    """Warn where fp16 was judged without a GPU.

    Args:
        rows: Trials of the configurations the verdict names.
    """
    if any(r.settings.get("precision") == "fp16" and r.summary.device == "cpu" for r in rows):
        return (ON_CPU,)
    return ()


def order_of_proposals(study: StudySettings, *, has_space: bool) -> tuple[str, ...]:
    """Warn where a study run again would try other configurations.

    Args:
        study: Sampler and trials at once; None there stands for as many as fit.
        has_space: False where nothing was searched.
    """
    if has_space and study.search.sampler == "tpe" and study.search.max_concurrent != 1:
        return (IN_FLIGHT,)
    return ()


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
