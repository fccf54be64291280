"""What TPE hears of a long study: enough to learn from, and never everything again."""

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.samplers._tpe.sampler import _split_trials, default_gamma

from stability_search.search import hearing, tpe
from stability_search.search.hearing import Result, worth_hearing
from stability_search.search.sampler import (
    Sampler,
)
from stability_search.space import Space
from tests.search.sampled import TOY, judge, run


@st.composite
def any_results(draw: st.DrawFn) -> list[Result]:
    """Draw the results of a conditional space, with ties, at indices with gaps."""
    names = [frozenset("a"), frozenset("ab"), frozenset("abc")]
    return [
        Result(
            index=index,
            names=draw(st.sampled_from(names)),
            value=draw(st.sampled_from([0.0, 0.1, 0.5, 0.5, 0.9])),
            constraint=draw(st.sampled_from([-0.05, 0.0, 0.2, 1.5])),
        )
        for index in draw(st.sets(st.integers(0, 99), max_size=40))
    ]


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make TPE's choice begin after 16 results instead of 1,250."""
    monkeypatch.setattr(hearing, "MOST_WHOLE", 16)
    monkeypatch.setattr(hearing, "MIN_RECENT", 8)
    monkeypatch.setattr(hearing, "MOST_EARLY", 4)
    monkeypatch.setattr(hearing, "BLOCK", 4)
    monkeypatch.setattr(hearing, "NUM_BEST", 3)


def heard_by(sampler: Sampler) -> set[int]:
    """Return the indices of the proposals that TPE has heard of."""
    sampler._heard()  # noqa: SLF001 - nothing else shows it
    return set(sampler._numbers)  # noqa: SLF001


@pytest.mark.usefixtures("short_memory")
class TestHearing:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(results=any_results(), order=st.randoms(use_true_random=False))
    def test_every_group_of_settings_keeps_its_best_and_the_most_recent_are_all_heard(
        self, results: list[Result], order: Random
    ) -> None:
        chosen, first_recent = worth_hearing(results)
        assert len(chosen) < max(16, 8 + 4 + 4 + 3 * 3)
        assert [one.index for one in chosen] == sorted(one.index for one in chosen)
        assert {one.index for one in results if one.index >= first_recent} <= {
            one.index for one in chosen
        }
        for group in ("a", "ab", "abc"):  # what TPE models together, and sorts like this
            best, heard = (
                sorted((one for one in some if set(group) <= one.names), key=lambda one: one.rank)
                for some in (results, chosen)
            )
            assert heard[:3] == best[:3]
        order.shuffle(results)
        assert worth_hearing(results) == (chosen, first_recent)

    def test_few_results_are_heard_whole(self) -> None:
        results = [
            Result(index=k, names=frozenset(), value=0.0, constraint=0.0) for k in range(16)
        ]
        assert worth_hearing(results[:15]) == (results[:15], 0)
        chosen, first_recent = worth_hearing(results)
        assert [one.index for one in chosen] == [0, 1, 2, 4, 6, *range(8, 16)]
        assert first_recent == 8

    def test_the_best_are_as_many_as_optuna_takes_and_as_it_sorts_them(
        self, make_space: Callable[..., Space], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.undo()
        assert {default_gamma(count) for count in (250, 1000, 10_000)} == {hearing.NUM_BEST}
        random = Random(0)  # noqa: S311 - no secret
        study, results = tpe.TpeStudy(make_space(TOY)), []
        for index in range(400):
            value, constraint = random.choice([0.0, 0.5]), random.choice([-0.05, 0.2, 1.0])
            number = study.add({"learning_rate": 1e-3, "clip_norm": None})
            study.finish(number, value=value, constraint=constraint)
            results.append(
                Result(index=index, names=frozenset(), value=value, constraint=constraint)
            )
        inner = study._study  # noqa: SLF001 - nothing else shows what Optuna makes of it
        for count in (25, 350):  # the worst feasible ones, and the first infeasible ones
            below, _ = _split_trials(inner, inner.trials, count)
            ours = sorted(results, key=lambda one: one.rank)[:count]
            assert sorted(one.index for one in ours) == [trial.number for trial in below]

    def test_what_tpe_hears_stays_bounded(self, make_space: Callable[..., Space]) -> None:
        """The twin has a long memory, and hears of every trial."""
        sampler = Sampler(make_space(TOY))
        list(run(sampler, 40))
        assert len(heard_by(sampler)) < 8 + 4 + 4 + 2 * 3
        hearing.MOST_WHOLE = 1000  # the fixture puts it back
        longer = Sampler(make_space(TOY))
        list(run(longer, 40))
        assert len(heard_by(longer)) == 40

    @settings(
        max_examples=8,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        rebuilds=st.sets(st.integers(10, 35), max_size=4),
        order=st.randoms(use_true_random=False),
    )
    def test_rebuilding_at_any_point_and_in_any_order_changes_nothing(
        self, make_space: Callable[..., Space], rebuilds: set[int], order: Random
    ) -> None:
        reference = list(run(Sampler(make_space(TOY)), 36))
        sampler, history = Sampler(make_space(TOY)), []
        for index in range(36):
            if index in rebuilds:
                order.shuffle(history)
                sampler.rebuild(history)
            values = sampler.propose(index)
            sampler.tell(index, judge(values))
            history.append((index, values, judge(values)))
        assert sorted(history) == list(
            zip(range(36), reference, map(judge, reference), strict=True)
        )

    @settings(
        max_examples=8,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(order=st.randoms(use_true_random=False), num_late=st.integers(0, 3))
    def test_the_order_of_finishing_does_not_matter_once_the_same_trials_are_in(
        self, make_space: Callable[..., Space], order: Random, num_late: int
    ) -> None:
        """Of 27 trials some finish after TPE has chosen what it hears, early ones among them."""
        rates = [10 ** (-5 * (k % 23) / 23) for k in range(27)]
        proposals = [{"learning_rate": rate, "clip_norm": 0.5} for rate in rates]
        in_order, shuffled = Sampler(make_space(TOY)), Sampler(make_space(TOY))
        late = order.sample(range(12), num_late)
        for sampler, finishing in (
            (in_order, [*range(27)]),
            (shuffled, [*(k for k in range(27) if k not in late), *late]),
        ):
            for index, values in enumerate(proposals):
                sampler.take_up(index, values)
            for count, index in enumerate(finishing):
                if count == 27 - num_late:
                    heard_by(sampler)
                sampler.tell(index, judge(proposals[index]))
        assert in_order.propose(27) == shuffled.propose(27)
        assert heard_by(in_order) == heard_by(shuffled)  # a draw may hide the difference
