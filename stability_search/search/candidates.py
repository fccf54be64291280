"""Which configurations the search hands to confirm, and the learning rates around each.

The search ranks by q, and q is highest near the cliff. So what is confirmed is never a point but
a ladder: the same configuration at learning rates a doubling apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json
from stability_search.space import Space

Q_TIE = 0.02  # judgement: runs this close in q are equally good, and the calmer rate is taken
_ROUNDING = 1e-12  # .90 and .88 are .02 apart, whatever binary floats make of it
_OCTAVE = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A configuration worth confirming.

    Attributes:
        settings: Every named setting, as it was searched.
        config_id: Hash of the active ones.
        learning_rate: The rate its octaves are counted from, > 0.
    """

    settings: Mapping[str, Json]
    config_id: str
    learning_rate: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One configuration of a ladder.

    Attributes:
        octave: Doublings of the learning rate above the candidate's, negative below.
        settings: The candidate's, at this learning rate.
        config_id: Hash of the active ones.
        learning_rate: The candidate's times 2**octave, exactly.
        is_in_range: True if the space allows this rate, so that it may become a base.
    """

    octave: int
    settings: Mapping[str, Json]
    config_id: str
    learning_rate: float
    is_in_range: bool


def learning_rate_of(settings: Mapping[str, Json]) -> float:
    """Return the learning rate of a configuration.

    Args:
        settings: Every named setting.

    Raises:
        ValueError: There is none, or it is not a number.
    """
    value = settings.get("learning_rate")
    try:
        return float(value)  # type: ignore[arg-type]  # whatever is no number raises
    except TypeError as error:
        raise ValueError(f"learning_rate: a number must be set, but got {value!r}.") from error


def _candidate(row: TrialRow) -> Candidate:
    return Candidate(
        settings=row.settings,
        config_id=row.config_id,
        learning_rate=learning_rate_of(row.settings),
    )


def _is_neighbour(one: Candidate, other: Candidate) -> bool:
    """Say whether two configurations differ in the learning rate alone, by an octave or less."""
    low, high = sorted((one.learning_rate, other.learning_rate))
    rest = [{k: v for k, v in c.settings.items() if k != "learning_rate"} for c in (one, other)]
    return high <= _OCTAVE * low and rest[0] == rest[1]


def todays_candidate(rows: Sequence[TrialRow]) -> Candidate | None:
    """Return what the user trains with today: the search tries it first, as trial 0.

    Args:
        rows: Finished trials of a study whose space has a `start_with`.
    """
    firsts = [row for row in rows if row.stage is Stage.SEARCH and row.index == 0]
    return _candidate(min(firsts, key=lambda row: row.attempt)) if firsts else None


def find_candidates(
    rows: Sequence[TrialRow], space: Space, score: Callable[[TrialRow], float | None]
) -> tuple[Candidate, ...]:
    """Pick what is worth confirming, best first.

    From the completed search trials with q > 0, one at a time: of those within .02 of the
    highest q left, the lowest learning rate; unless it is within an octave of an earlier pick
    and equal to it otherwise. The first `start_with` configuration is added whatever its q.

    Args:
        rows: Finished trials; only those of the search count. Their order does not matter.
        space: The study's space. Without a `space` block its one configuration is the candidate.
        score: q of a search trial as it stood when confirm began; None if it has none.

    Returns:
        At most `confirm.top` candidates, and one more with `start_with`; may be empty.
    """
    if not space.has_space:
        settings = space.settings({})
        only = Candidate(
            settings=settings,
            config_id=space.config_id(settings),
            learning_rate=learning_rate_of(settings),
        )
        return (only,)
    left = [
        (q, _candidate(row))
        for row in rows
        if row.stage is Stage.SEARCH
        and row.summary.outcome is Outcome.COMPLETED
        and (q := score(row)) is not None
        and q > 0
    ]
    picked: list[Candidate] = []
    while left and len(picked) < space.study.confirm.top:
        highest = max(q for q, _ in left)
        best = min(
            (pair for pair in left if highest - pair[0] <= Q_TIE + _ROUNDING),
            key=lambda pair: (pair[1].learning_rate, -pair[0], pair[1].config_id),
        )
        left.remove(best)
        if not any(_is_neighbour(best[1], earlier) for earlier in picked):
            picked.append(best[1])
    today = todays_candidate(rows) if space.start_with else None
    if today is not None and today.config_id not in {c.config_id for c in picked}:
        picked.append(today)
    return tuple(picked)


class Grid:
    """The learning rates around one candidate, a doubling apart.

    Args:
        candidate: Octave 0.
        space: Gives the range of learning rates, and `confirm.octaves`, K.
    """

    def __init__(self, candidate: Candidate, space: Space) -> None:
        self.candidate = candidate
        self.octaves = space.study.confirm.octaves
        self._space = space
        self._low, self._high = space.learning_rate_range()
        self._rungs: dict[int, Rung] = {}
        below = 0
        while below < 2 * self.octaves and self.rung(-below - 1).is_in_range:
            below += 1
        self.lowest = -below

    def rung(self, octave: int) -> Rung:
        """Return the configuration at 2**octave times the candidate's learning rate."""
        if octave not in self._rungs:
            self._rungs[octave] = self._build(octave)
        return self._rungs[octave]

    def _build(self, octave: int) -> Rung:
        rate = self.candidate.learning_rate * _OCTAVE**octave  # exact: a power of two
        settings = self.candidate.settings
        if octave:
            settings = self._space.at_learning_rate(settings, rate)
        return Rung(
            octave=octave,
            settings=settings,
            config_id=self._space.config_id(settings) if octave else self.candidate.config_id,
            learning_rate=rate,
            is_in_range=octave == 0 or self._low <= rate <= self._high,
        )

    @property
    def has_one_base(self) -> bool:
        """True if no other rung of the ladder is in range: the candidate is its own base."""
        others = (*range(self.lowest, 0), *range(1, self.octaves + 1))
        return not any(self.rung(octave).is_in_range for octave in others)
