"""Where configurations stand: rows and a yardstick become q, S and the bar.

Nothing here is stored. Scores are computed from the raw numbers in the rows whenever they are
read, so a new Delta changes them all alike. Explained in `stability_search/README.md`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.records.values import Json, finite_or_none
from stability_search.scoring.chance import bad_rate_bound
from stability_search.scoring.configuration import StabilityScore, stability_score
from stability_search.scoring.constants import S_V1
from stability_search.scoring.run import ZERO_RUN, RunScore, probe_levels
from stability_search.settings.study import StudySettings
from stability_search.yardstick import Yardstick, readings, score_completed

LEARNING_RATE = "learning_rate"
LADDER_SEEDS = 2  # the rungs of a ladder run on so many of the seeds

_FamilyKey: TypeAlias = frozenset[tuple[str, object]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigurationStanding:
    """Where one configuration stands after confirm, at its own learning rate.

    Attributes:
        config_id: Hash of its settings; empty if none of its trials has ended.
        settings: Every named setting, the learning rate included.
        score: S and what it is made of.
        q: q of every seed that gave one, in the order of `seed_indices`.
        seed_indices: Those seeds, rising; asked-for seeds without a result are missing here.
        calm: A, mean over these seeds.
        smooth: B, mean over these seeds.
        kept: C, mean over these seeds.
        progress: P, mean over these seeds.
        rungs: q of every seed at 2, 4, ... times the learning rate; None where nothing was run.
        meets_bar: True if every asked-for seed completed with q >= 1/2 and the margin is at
            least `confirm.min_margin`.
        missed: What it missed of that, in plain words; empty if it meets the bar.
        num_completed: Seeds that completed.
        num_bad_steps: `bad` steps of these seeds together.
        num_judged_steps: `ok` and `bad` steps of these seeds together.
        bad_rate_bound: Upper bound on the rate of bad steps at 95 %, in [0, 1].
        num_planned_steps: The horizon it was confirmed over.
        probe_last: Mean over these seeds of the last probe level E_T; None if one is not finite.
    """

    config_id: str
    settings: Mapping[str, Json]
    score: StabilityScore
    q: tuple[float, ...]
    seed_indices: tuple[int, ...]
    calm: float
    smooth: float
    kept: float
    progress: float
    rungs: tuple[tuple[float, ...] | None, ...]
    meets_bar: bool
    missed: tuple[str, ...]
    num_completed: int
    num_bad_steps: int
    num_judged_steps: int
    bad_rate_bound: float
    num_planned_steps: int
    probe_last: float | None


def score_trial(row: TrialRow, yardstick: Yardstick) -> RunScore | None:
    """Score one trial at the yardstick's horizon.

    Args:
        row: A finished trial. A pilot trial may have run longer than the horizon: then only its
            first steps and the readings of that horizon count.
        yardstick: Constants of the horizon; without a Delta q is 0.

    Returns:
        q and its factors. All are 0 for a trial that was stopped, ran out of memory or timed
        out; None for `user_error` and `infrastructure`, which say nothing about stability.

    Raises:
        ValueError: The trial planned fewer steps than the horizon, or, pilot aside, more.
    """
    planned = row.summary.num_planned_steps
    is_of_horizon = planned == yardstick.horizon or (
        row.stage is Stage.PILOT and planned > yardstick.horizon
    )
    if not is_of_horizon:
        raise ValueError(
            f"{row.trial_id}: a trial of {yardstick.horizon} planned steps must be given, but got "
            f"one of {planned}. Scores of different horizons are never compared."
        )
    if not row.summary.outcome.is_result:
        return None
    if row.summary.outcome is not Outcome.COMPLETED:
        return ZERO_RUN
    return score_completed(
        row.summary, horizon=yardstick.horizon, e0=yardstick.e0, delta=yardstick.delta
    )


@dataclass(frozen=True, slots=True)
class _ScoredTrial:
    row: TrialRow
    run: RunScore


class _ConfirmTrials:
    """The confirm trials of one horizon that gave a result, found by settings in one step."""

    def __init__(self, rows: Iterable[TrialRow], yardstick: Yardstick) -> None:
        self._yardstick = yardstick
        latest: dict[tuple[_FamilyKey, object], dict[int, TrialRow]] = {}
        for row in rows:
            if row.stage is not Stage.CONFIRM or not row.summary.outcome.is_result:
                continue
            if row.summary.num_planned_steps != yardstick.horizon:
                continue
            seeds = latest.setdefault(_place(row.settings), {})
            known = seeds.get(row.seed_index)
            if known is None or row.attempt > known.attempt:
                seeds[row.seed_index] = row
        self._rows = latest
        self._scored: dict[tuple[str, int], _ScoredTrial] = {}

    def at(
        self, place: tuple[_FamilyKey, object], seed_indices: Sequence[int]
    ) -> list[_ScoredTrial]:
        """Return the scored trials of a configuration, by rising seed index."""
        seeds = self._rows.get(place, {})
        return [self._score(seeds[index]) for index in seed_indices if index in seeds]

    def _score(self, row: TrialRow) -> _ScoredTrial:
        key = (row.trial_id, row.attempt)
        if key not in self._scored:  # a rung serves several bases; its spikes are counted once
            run = score_trial(row, self._yardstick)
            assert run is not None  # noqa: S101 - only results are kept
            self._scored[key] = _ScoredTrial(row, run)
        return self._scored[key]


def _place(settings: Mapping[str, Json]) -> tuple[_FamilyKey, object]:
    """Split settings into what rungs share and the learning rate, both fit for a dict's key."""
    family = frozenset(
        (name, _hashable(value)) for name, value in settings.items() if name != LEARNING_RATE
    )
    return family, settings[LEARNING_RATE]


def _hashable(value: Json) -> object:
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return value


def configuration_standing(
    rows: Iterable[TrialRow],
    settings: Mapping[str, Json],
    *,
    study: StudySettings,
    yardstick: Yardstick,
    seed_indices: Sequence[int],
) -> ConfigurationStanding:
    """Say where one configuration stands, with its own learning rate as the base.

    Args:
        rows: Rows of any stage; confirm trials of the yardstick's horizon count. Where a trial
            was repeated, its last attempt that gave a result does.
        settings: Every named setting of the configuration.
        study: `confirm.octaves` and `confirm.min_margin` decide the rungs and the bar.
        yardstick: Constants of the confirm horizon.
        seed_indices: Seeds asked for; rungs are read at the same seeds, as far as they ran.

    Returns:
        Score, factors and bar. A seed without a result is left out of the score, and the
        configuration then does not meet the bar.
    """
    trials = _ConfirmTrials(rows, yardstick)
    return _standing(trials, settings, study=study, yardstick=yardstick, asked=seed_indices)


def configuration_standings(
    rows: Iterable[TrialRow], *, study: StudySettings, yardstick: Yardstick
) -> tuple[ConfigurationStanding, ...]:
    """Say where every configuration with confirm trials stands, best score first.

    Asked for are `confirm.seeds` seeds; twice as many of a configuration that took part in the
    second look, which any of its trials with a later seed shows.

    Args:
        rows: Rows of any stage; confirm trials of the yardstick's horizon count.
        study: Settings of the study.
        yardstick: Constants of the confirm horizon.
    """
    rows = [
        row
        for row in rows
        if row.stage is Stage.CONFIRM and row.summary.num_planned_steps == yardstick.horizon
    ]
    settings: dict[str, Mapping[str, Json]] = {}
    last_seed: dict[str, int] = {}
    for row in rows:
        settings[row.config_id] = row.settings
        last_seed[row.config_id] = max(row.seed_index, last_seed.get(row.config_id, 0))
    trials = _ConfirmTrials(rows, yardstick)
    seeds = study.confirm.seeds
    standings = [
        _standing(
            trials,
            settings[config_id],
            study=study,
            yardstick=yardstick,
            asked=range(seeds if last_seed[config_id] < seeds else 2 * seeds),
            config_id=config_id,
        )
        for config_id in settings
    ]
    return tuple(sorted(standings, key=lambda one: (-one.score.score, one.config_id)))


def _standing(  # noqa: PLR0913 - one configuration among the study's trials, by keyword
    trials: _ConfirmTrials,
    settings: Mapping[str, Json],
    *,
    study: StudySettings,
    yardstick: Yardstick,
    asked: Sequence[int],
    config_id: str = "",
) -> ConfigurationStanding:
    asked = sorted(set(asked))
    octaves = study.confirm.octaves
    family, learning_rate = _place(settings)
    seeds = trials.at((family, learning_rate), asked)
    # A rung that was itself a base once has more seeds than a ladder asks for; they must not
    # count against the rungs below it.
    on_ladder = [index for index in asked if index < LADDER_SEEDS]
    rungs = [
        trials.at((family, _doubled(learning_rate, k)), on_ladder) for k in range(1, octaves + 1)
    ]
    rung_q = tuple(tuple(one.run.q for one in rung) or None for rung in rungs)
    score = stability_score([one.run.q for one in seeds], rung_q, octaves)
    beyond = trials.at((family, _doubled(learning_rate, octaves + 1)), on_ladder)
    if any(one.run.q < S_V1.alive_q for one in beyond):  # a higher base once broke there
        score = replace(score, margin_is_capped=False)
    missed = _missed(seeds, len(asked), score, study)
    summaries = [one.row.summary for one in seeds]
    num_bad = sum(summary.num_bad_steps for summary in summaries)
    num_judged = sum(summary.num_judged_steps for summary in summaries)
    return ConfigurationStanding(
        config_id=seeds[0].row.config_id if seeds else config_id,
        settings=settings,
        score=score,
        q=tuple(one.run.q for one in seeds),
        seed_indices=tuple(one.row.seed_index for one in seeds),
        calm=_mean([one.run.calm for one in seeds]),
        smooth=_mean([one.run.smooth for one in seeds]),
        kept=_mean([one.run.kept for one in seeds]),
        progress=_mean([one.run.progress for one in seeds]),
        rungs=rung_q,
        meets_bar=not missed,
        missed=missed,
        num_completed=sum(s.outcome is Outcome.COMPLETED for s in summaries),
        num_bad_steps=num_bad,
        num_judged_steps=num_judged,
        bad_rate_bound=bad_rate_bound(num_bad, num_judged),
        num_planned_steps=yardstick.horizon,
        probe_last=finite_or_none(
            _mean([probe_levels(readings(s, yardstick.horizon))[-1] for s in summaries])
        )
        if seeds
        else None,
    )


def _doubled(learning_rate: object, octave: int) -> object:
    """Return the learning rate `octave` doublings up: exact, so that rungs match by equality."""
    return learning_rate * 2**octave if isinstance(learning_rate, int | float) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _missed(
    seeds: Sequence[_ScoredTrial], num_asked: int, score: StabilityScore, study: StudySettings
) -> tuple[str, ...]:
    """Say in plain words what of the bar was missed."""
    missed = []
    if len(seeds) < num_asked or num_asked == 0:
        missed.append(f"{len(seeds)} of {num_asked} seeds gave a result")
    ended = Counter(one.row.summary.outcome for one in seeds)
    if ended[Outcome.COMPLETED] < len(seeds):
        others = sorted((outcome, n) for outcome, n in ended.items() if outcome != "completed")
        names = ", ".join(f"{n} {outcome}" for outcome, n in others)
        missed.append(f"{ended[Outcome.COMPLETED]} of {len(seeds)} seeds completed ({names})")
    num_alive = sum(one.run.q >= S_V1.alive_q for one in seeds)
    if num_alive < len(seeds):
        missed.append(f"{num_alive} of {len(seeds)} seeds reached q >= 1/2")
    octaves, wanted = study.confirm.octaves, study.confirm.min_margin
    if octaves > 0 and score.margin_octaves < wanted:
        missed.append(
            f"survived {_doublings(score.margin_octaves)} of the learning rate, {wanted} asked for"
        )
    return tuple(missed)


def _doublings(count: int) -> str:
    return "1 doubling" if count == 1 else f"{count} doublings"
