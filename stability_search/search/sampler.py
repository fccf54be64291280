"""Who proposes the next configuration: our own sampler around Optuna's TPE.

Optuna hears finite numbers only, and a failing configuration is told as infeasible, never as
FAIL: samplers ignore FAIL, so a failing region would look unexplored and draw them in.

A proposal is a pure function of the space, its index, what was told, and what is in flight, in
the order of the indices; the order of finishing does not matter. Each has a seed of its own, so a
resumed study goes on exactly as it would have and never repeats itself.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stability_search.records.trial import Outcome, TrialSummary
from stability_search.search.hearing import Result, num_early, worth_hearing
from stability_search.search.points import active_values, random_point, sobol_point, values_at
from stability_search.search.tpe import TpeStudy, distribution
from stability_search.seeding import derive_seed
from stability_search.space import Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NUM_STARTUP = 10  # results that TPE waits for; until then a quasi-random sequence proposes
MAX_DRAWS = 20  # attempts to find a configuration that was not proposed before
STOPPED_WEIGHT = 0.01  # a stopped trial is worth t/T of this, always below a healthy q

Values = Mapping[str, Any]
_Key = frozenset[tuple[str, Any]]  # values, for a set


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What the sampler is told of one trial.

    Attributes:
        value: To be maximised, finite.
        constraint: Feasible when <= 0, finite; larger is worse.
    """

    value: float
    constraint: float

    def __post_init__(self) -> None:
        """Refuse what would corrupt the sampler.

        Raises:
            ValueError: A number is NaN or infinite.
        """
        if not (math.isfinite(self.value) and math.isfinite(self.constraint)):
            raise ValueError(
                f"value and constraint must be finite, but got {self.value!r} and "
                f"{self.constraint!r}."
            )


def told(summary: TrialSummary, q: float | None, *, bad_rate: float) -> Told | None:
    """Say what the sampler is told of a search trial.

    Args:
        summary: How the trial ended.
        q: Its run score, in [0, 1]; needed where it `completed`.
        bad_rate: r0 of the kill rule: the rate of bad steps still feasible, in (0, 1).

    Returns:
        Value and constraint; None for `user_error` and `infrastructure`, which say nothing
        about the configuration. A stopped trial is always less feasible than a completed one,
        and the later it was stopped the better it is.

    Raises:
        ValueError: `q` of a completed trial is missing or not finite.
    """
    if not summary.outcome.is_result:
        return None
    if summary.outcome is Outcome.COMPLETED:
        if q is None:
            raise ValueError("q: a completed trial must have a run score, but got None.")
        share = summary.num_bad_steps / summary.num_judged_steps if summary.num_judged_steps else 1
        return Told(value=q, constraint=share - bad_rate)
    if summary.outcome.is_unstable:
        step, horizon = summary.num_steps, summary.num_planned_steps
        return Told(
            value=STOPPED_WEIGHT * step / horizon,
            constraint=1 - bad_rate + 1 - step / (horizon + 1),
        )
    return Told(value=0.0, constraint=1.0)


@dataclass(slots=True)
class _Proposal:
    values: Values
    is_in_flight: bool = True
    told: Told | None = None


class Sampler:
    """Proposes the values of a study's varying settings, one proposal an index.

    First come the `start_with` configurations, with values that they leave out sampled. `tpe`
    then follows a quasi-random (Sobol) sequence until 10 results are in, and learns from there;
    `qmc` follows the sequence throughout, `random` draws independently; those two never learn.
    From 1,250 results on TPE hears a choice of them, see `hearing.py`: what a proposal costs
    does not grow further.

    The search trains every configuration on the same seed, so a proposal equal to an earlier
    one would only repeat its run. Such a proposal is drawn again, up to 20 times; after that it
    is allowed, since a small space of choices may hold nothing else.

    Args:
        space: What varies, which configurations come first, the study's seed and its sampler.
    """

    def __init__(self, space: Space) -> None:
        """Begin with nothing proposed."""
        self._space = space
        self._proposals: dict[int, _Proposal] = {}
        self._known: set[_Key] = set()
        self._last_index = -1
        self._num_results = 0
        self._study: TpeStudy | None = None  # made again from the proposals whenever it is None
        self._numbers: dict[int, int] = {}  # index to number in that study, of what it has heard
        self._first_recent = 0  # results from this index on are all in it

    @property
    def learns(self) -> bool:
        """True if a proposal depends on what was told."""
        return self._space.study.search.sampler == "tpe"

    def propose(self, index: int) -> dict[str, Any]:
        """Propose values for one trial; it is in flight until it is told.

        Args:
            index: Position among the proposals of the study, from 0.

        Returns:
            A value for every setting that varies and is active.

        Raises:
            ValueError: The index was proposed before.
        """
        if index in self._proposals:
            raise ValueError(f"index: each is proposed once, but got {index} again.")
        values = self._draw(index, 0)
        for draw in range(1, MAX_DRAWS):
            if _key(values) not in self._known:
                break
            values = self._draw(index, draw)
        self._note(index, _Proposal(values=values))
        return dict(values)

    def take_up(self, index: int, values: Values) -> None:
        """Put a proposal of an earlier run in flight again; do nothing where it is known."""
        if index not in self._proposals:
            self._note(index, _Proposal(values=dict(values)))

    def tell(self, index: int, told: Told | None) -> None:
        """Tell what became of a proposal.

        Args:
            index: The proposal's.
            told: See the function `told`; None where the trial says nothing of the values.

        Raises:
            KeyError: No such proposal was made.
        """
        proposal = self._proposals[index]
        was_in_flight, count = proposal.is_in_flight, self._num_results
        self._num_results += (told is not None) - (proposal.told is not None)
        proposal.is_in_flight, proposal.told = False, told
        must_choose = num_early(count) != num_early(self._num_results)
        if not was_in_flight:
            self._forget()  # told again, after another attempt: Optuna cannot take that
        elif must_choose or index < self._first_recent:
            self._forget()  # other results are worth hearing now
        elif self._study is not None:
            self._hear(self._study, index)

    def rebuild(self, history: Iterable[tuple[int, Values, Told | None]]) -> None:
        """Replace everything told, after a refit of the yardstick or on resume.

        Args:
            history: Index, values and what is now told of every finished trial, in any order.
                Proposals in flight that it does not name stay in flight.
        """
        in_flight = {key: item for key, item in self._proposals.items() if item.is_in_flight}
        finished = {
            index: _Proposal(values=dict(values), is_in_flight=False, told=told)
            for index, values, told in history
        }
        self._proposals = in_flight | finished
        self._known = {_key(proposal.values) for proposal in self._proposals.values()}
        self._last_index = max(self._proposals, default=-1)
        self._num_results = sum(one.told is not None for one in self._proposals.values())
        self._forget()

    def _note(self, index: int, proposal: _Proposal) -> None:
        """Take in a proposal in flight."""
        self._proposals[index] = proposal
        self._known.add(_key(proposal.values))
        if index < self._last_index:
            self._forget()  # Optuna weighs by order, which must be that of the indices
        elif self._study is not None:
            self._hear(self._study, index)
        self._last_index = max(self._last_index, index)

    def _draw(self, index: int, draw: int) -> dict[str, Any]:
        space, sampler = self._space, self._space.study.search.sampler
        is_first = index < len(space.start_with)
        if sampler == "tpe" and not is_first and self._num_results >= NUM_STARTUP:
            return self._heard().draw(self._seed(index, draw))
        num_dimensions = len(space.parameters)
        if sampler == "random" or draw:
            point = random_point(num_dimensions, self._seed(index, draw))
        else:
            point = sobol_point(num_dimensions, index, derive_seed(space.study.seed, "proposal"))
        return values_at(space, point, space.start_with[index] if is_first else {})

    def _seed(self, index: int, draw: int) -> int:
        purpose = ("proposal", index, draw) if draw else ("proposal", index)
        return derive_seed(self._space.study.seed, *purpose)

    def _heard(self) -> TpeStudy:
        """Return Optuna's study of what is worth hearing, in the order of the indices."""
        if self._study is None:
            self._study = TpeStudy(self._space)
            chosen, self._first_recent = worth_hearing(self._results())
            in_flight = (key for key, item in self._proposals.items() if item.is_in_flight)
            for index in sorted([*in_flight, *(result.index for result in chosen)]):
                self._hear(self._study, index)
        return self._study

    def _results(self) -> Iterator[Result]:
        for index, proposal in self._proposals.items():
            if proposal.told is not None:
                yield Result(
                    index=index,
                    names=frozenset(proposal.values),
                    value=proposal.told.value,
                    constraint=proposal.told.constraint,
                )

    def _hear(self, study: TpeStudy, index: int) -> None:
        proposal = self._proposals[index]
        if index not in self._numbers:
            self._numbers[index] = study.add(proposal.values)
        number = self._numbers[index]
        if proposal.told is not None:
            value, constraint = proposal.told.value, proposal.told.constraint
            study.finish(number, value=value, constraint=constraint)
        elif not proposal.is_in_flight:
            study.drop(number)

    def _forget(self) -> None:
        self._study = None
        self._numbers.clear()


def _key(values: Values) -> _Key:
    return frozenset(values.items())


def varying_values(space: Space, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that were proposed for a configuration, from all its settings."""
    return active_values(space, lambda parameter: settings[parameter.name])


def as_optuna(
    space: Space, values: Values
) -> tuple[dict[str, Any], dict[str, "BaseDistribution"]]:
    """Return values and their distributions as the ledger's `search` study shows them."""
    active = [parameter for parameter in space.parameters if parameter.name in values]
    return (
        {parameter.name: values[parameter.name] for parameter in active},
        {parameter.name: distribution(parameter) for parameter in active},
    )
