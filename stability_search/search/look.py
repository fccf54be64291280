"""One look at the confirmed configurations: what they score, and which of them meet the bar."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stability_search.records.trial import Stage, TrialRow
from stability_search.search.candidates import Rung
from stability_search.search.choice import Choice, choose
from stability_search.search.ladder import Results, ladder_seeds
from stability_search.settings.study import StudySettings
from stability_search.standing import ConfigurationStanding, configuration_standing
from stability_search.yardstick import Yardstick, yardstick


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What one look shows.

    Attributes:
        measure: Constants of the confirm horizon, fitted to all rows of the look.
        confirmed: Every configuration that had all seeds.
        met: Those of them that compete and meet the bar.
        dropped_seeds: Seeds that one of them still lacks, left out of every paired test.
    """

    measure: Yardstick
    confirmed: tuple[ConfigurationStanding, ...]
    met: tuple[ConfigurationStanding, ...]
    dropped_seeds: frozenset[int]

    @property
    def met_ids(self) -> frozenset[str]:
        """`config_id` of those that meet the bar."""
        return frozenset(standing.config_id for standing in self.met)

    def choose(self, alpha: float) -> Choice:
        """Choose among those that meet the bar, of which there must be one."""
        return choose(self.met, alpha=alpha, dropped_seeds=self.dropped_seeds)


def rows_of_look(rows: Iterable[TrialRow], num_seeds: int) -> list[TrialRow]:
    """Leave out the trials of later looks, so that an earlier one never changes.

    Args:
        rows: Rows of every stage.
        num_seeds: Seeds of the look, counted from 0.
    """
    return [r for r in rows if r.stage is not Stage.CONFIRM or r.seed_index < num_seeds]


def take_look(  # noqa: PLR0913 - every argument is a fact of the look
    rows: Sequence[TrialRow],
    study: StudySettings,
    results: Results,
    *,
    rungs: Sequence[Rung],
    seeds_of: Mapping[str, Sequence[int]],
    competing: Iterable[str],
) -> Look:
    """Score the confirmed configurations by all rows given.

    Args:
        rows: Rows of every stage, up to this look.
        study: Seeds, octaves and bar.
        results: The same trials, to tell seeds that gave no result.
        rungs: The confirmed configurations.
        seeds_of: The seeds each of them is judged by, by `config_id`.
        competing: `config_id` of those that may be chosen.
    """
    measure = yardstick(rows, study.confirm.steps)
    pair = ladder_seeds(study.confirm)
    confirmed = tuple(
        configuration_standing(
            # What is a rung to one configuration may be a base with more seeds to another: a
            # margin rests on the ladder's seeds alone, or it would shrink with each of them.
            [r for r in rows if r.config_id == rung.config_id or r.seed_index in pair],
            rung.settings,
            study=study,
            yardstick=measure,
            seed_indices=seeds_of[rung.config_id],
        )
        for rung in rungs
    )
    competing = frozenset(competing)
    missing = (results.missing(id_, seeds_of[id_]) for id_ in competing if id_ in seeds_of)
    return Look(
        measure=measure,
        confirmed=confirmed,
        met=tuple(s for s in confirmed if s.meets_bar and s.config_id in competing),
        dropped_seeds=frozenset().union(*missing),
    )
