"""Which ladders are climbed, and how far: hardly further than it can change the verdict.

  first     the best candidate's ladder; of today's configuration the ladder too if it lives on
            the ladder's seeds, else those seeds alone
  others    together, unless a base of the first scores what any configuration could, but for 2 %
  hopeless  a ladder no rung of which meets the bar on the ladder's seeds: its base gets the other
            seeds only if nothing else meets the bar, to say what came closest
  fastest   the rung with the lowest last probe level of those that meet the bar gets all seeds,
            if no base ends as low

A base is chosen once all ladders it competes with have been walked, by the yardstick that their
trials give: the same that will judge it. What is asked for depends on the finished trials alone,
never on how many run at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stability_search.search.candidates import Candidate, Grid, Rung
from stability_search.search.ladder import Ladder, Progress, Results, Wanted
from stability_search.settings.study import ConfirmSettings

CLEARLY_LOWER = 0.02  # judgement: share of Delta by which a last probe level must be lower


@dataclass(frozen=True, kw_only=True, slots=True)
class Ladders:
    """How far every candidate's ladder has come, in the order of the candidates.

    Attributes:
        candidates: Best first.
        progress: One for each.
        is_decided: True once no candidate without a base can change the verdict.
        fastest: A rung beside the bases that ends clearly lower than any of them, with all
            seeds; None if there is none, or not yet.
    """

    candidates: tuple[Candidate, ...]
    progress: tuple[Progress, ...]
    is_decided: bool = False
    fastest: Rung | None = None

    @property
    def bases(self) -> tuple[Rung, ...]:
        """Bases with all seeds, each once."""
        return _once(progress.base for progress in self.progress)

    @property
    def confirmed(self) -> tuple[Rung, ...]:
        """Bases, what was a base before them, and the fastest, each once."""
        outgrown = (progress.outgrown for progress in self.progress)
        return _once((*self.bases, *outgrown, self.fastest))

    @property
    def confirmed_ids(self) -> tuple[str, ...]:
        """`config_id` of each of these."""
        return tuple(rung.config_id for rung in self.confirmed)

    @property
    def is_first_known(self) -> bool:
        """True once the first candidate has a base, or is known to miss the bar beside one."""
        first = self.progress[0]
        is_beside_one = first.is_hopeless and bool(self.bases)
        return first.base is not None or self.is_decided or is_beside_one

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Candidates without a base that the budget left out."""
        return () if self.is_decided else self._without_base

    @property
    def spared(self) -> tuple[str, ...]:
        """Candidates without a base that were left out although the budget allowed them."""
        return self._without_base if self.is_decided else ()

    @property
    def _without_base(self) -> tuple[str, ...]:
        pairs = zip(self.candidates, self.progress, strict=True)
        return tuple(c.config_id for c, progress in pairs if progress.base is None)


def _once(rungs: Iterable[Rung | None]) -> tuple[Rung, ...]:
    unique = {rung.config_id: rung for rung in rungs if rung is not None}
    return tuple(unique.values())


Refit = Callable[[frozenset[str]], tuple[Results, float | None]]


class Climb:
    """The ladders of all candidates, climbed as far as the finished trials allow.

    Args:
        grids: The learning rates around each candidate, best first.
        today: Position of the configuration that the user trains with today; None if it is not
            known or the first anyway.
        confirm: Seeds, octaves and the margin asked for.
        results: Finished trials, by the yardstick with which confirm began: it decides how far
            ladders are walked.
        refit: The same trials and Delta by the yardstick that the ladder trials of these
            configurations give: it decides which rung becomes the base.
        can_afford: Says whether the budget allows so many more trials.
    """

    def __init__(  # noqa: PLR0913 - what a confirmation is made of
        self,
        grids: Sequence[Grid],
        *,
        today: int | None,
        confirm: ConfirmSettings,
        results: Results,
        refit: Refit,
        can_afford: Callable[[int], bool],
    ) -> None:
        self._ladders = [Ladder(grid, confirm, results) for grid in grids]
        self._candidates = tuple(grid.candidate for grid in grids)
        self._today = today
        self._refit = refit
        self._can_afford = can_afford
        self._delta: float | None = None
        self._judged: dict[int, Ladder] = {}  # by the refitted yardstick
        self._progress = [Progress() for _ in grids]
        self._asked: dict[tuple[str, int], Rung] = {}
        self._reserved: dict[int, int] = {}  # trials that ladders may still need
        self._is_affordable = True

    def climb(self) -> tuple[list[tuple[Rung, int]], Ladders]:
        """Return the rungs and seeds that are needed now, and how far the ladders have come."""
        is_decided = self._is_decided_by_the_first()
        if not (self._asked or is_decided):
            is_decided = self._is_decided_by_all()
        fastest = None if self._asked else self._fastest()
        needed = [(rung, seed) for (_, seed), rung in self._asked.items()]
        return needed, Ladders(
            candidates=self._candidates,
            progress=tuple(self._progress),
            is_decided=is_decided,
            fastest=None if needed else fastest,
        )

    def _is_decided_by_the_first(self) -> bool:
        """Walk the first ladders; where a base could hardly be beaten, see whether it holds."""
        self._walk(0, self._ladders[0].walk())
        today = self._today
        if today is not None:
            self._walk(today, self._ladders[today].glance())
        first = [0] if today is None else [0, today]
        if any(self._progress[position].wanted for position in first):
            return False
        walked = [p for p in first if p == 0 or self._ladders[p].is_alive]
        self._judge(walked)
        if any(self._judged[position].looks_unbeatable for position in walked):
            for position in walked:
                self._ask(position, self._judged[position].progress())
        return not self._asked and any(map(self._is_unbeatable, walked))

    def _is_decided_by_all(self) -> bool:
        """Walk every ladder, then fill the bases; hopeless ones only if nothing else holds."""
        everyone = range(len(self._ladders))
        for position in everyone:
            self._walk(position, self._ladders[position].walk())
        if self._asked:
            return False
        walked = [position for position in everyone if not self._progress[position].wanted]
        self._judge(walked)
        for position in walked:
            self._ask(position, self._judged[position].progress())
        have_ended = len(walked) == len(everyone) and all(
            progress.is_hopeless or not progress.wanted for progress in self._progress
        )
        if have_ended and any(map(self._meets_bar, walked)):
            return True
        if have_ended and not self._asked:
            for position in walked:
                self._ask(position, self._progress[position], even_hopeless=True)
        if walked and not self._asked:  # the budget allows no other: finish the first
            self._ask(walked[0], self._progress[walked[0]], even_hopeless=True)
        return False

    def _walk(self, position: int, wanted: tuple[Wanted, ...]) -> None:
        self._ask(position, Progress(wanted=wanted))
        if not wanted and self._ladders[position].climbed_ids:  # its base is still to come
            self._reserved[position] = self._ladders[position].most_to_fill()

    def _judge(self, walked: Sequence[int]) -> None:
        """Score the walked ladders by the yardstick that they give together."""
        ids = (self._ladders[position].climbed_ids for position in walked)
        results, self._delta = self._refit(frozenset().union(*ids))
        self._judged = {p: self._ladders[p].judged_by(results) for p in walked}

    def _ask(self, position: int, progress: Progress, *, even_hopeless: bool = False) -> None:
        """Ask for what a ladder needs, if it can be afforded beside those before it."""
        self._progress[position] = progress
        is_put_off = progress.is_hopeless and not even_hopeless
        if is_put_off and position > 0:  # filled only if nothing else holds: it can wait
            self._reserved.pop(position, None)
            return
        wanted = {} if is_put_off else dict(_keyed(progress.wanted))
        new = {key: rung for key, rung in wanted.items() if key not in self._asked}
        before = sum(count for key, count in self._reserved.items() if key < position)
        can_go_on = not new or self._can_afford(before + len(new))
        # Nothing comes before the first; a later one must not pass one that cannot go on.
        self._is_affordable = can_go_on and (position == 0 or self._is_affordable)
        if self._is_affordable and progress.wanted:
            self._asked |= new
            judged = self._judged.get(position)
            left = (
                self._ladders[position].most_trials_left()
                if judged is None
                else judged.most_to_fill()
            )
            self._reserved[position] = max(left, len(new))

    def _is_unbeatable(self, position: int) -> bool:
        base = self._progress[position].base
        return base is not None and self._judged[position].is_unbeatable(base)

    def _meets_bar(self, position: int) -> bool:
        base = self._progress[position].base
        return base is not None and self._judged[position].meets_bar(base)

    def _fastest(self) -> Rung | None:
        """Ask for all seeds of the rung that ends clearly lower than every base, if there is."""
        bases = {position: self._progress[position].base for position in self._judged}
        ended = [(self._judged[p], base) for p, base in bases.items() if base is not None]
        levels = [ladder.last_level(base) for ladder, base in ended if ladder.meets_bar(base)]
        rungs = [(ladder, rung) for ladder, _ in ended for rung in ladder.sound_rungs()]
        if not (levels and rungs) or self._delta is None:
            return None
        ladder, rung = min(rungs, key=lambda one: (one[0].last_level(one[1]), one[1].config_id))
        if ladder.last_level(rung) > min(levels) - CLEARLY_LOWER * self._delta:
            return None
        wanted = dict(_keyed(ladder.wanted_for(rung)))
        if wanted and self._can_afford(len(wanted)):
            self._asked |= wanted
        return None if wanted else rung


def _keyed(wanted: Iterable[Wanted]) -> Iterator[tuple[tuple[str, int], Rung]]:
    for one in wanted:
        for seed in one.seeds:
            yield (one.rung.config_id, seed), one.rung
