"""What a verdict warns of that the settings and the rows show."""

from dataclasses import replace

import pytest

from stability_search.records.trial import TrialRow
from stability_search.search.caveats import loss_may_differ
from stability_search.space import Space
from stability_search.space.parameter import Parameter
from tests.search.confirm_world import config, make_space, searched


def with_task_settings(*names: str) -> Space:
    space = make_space()
    own = tuple(replace(_choice(space), name=name) for name in names)
    return replace(space, parameters=(*space.parameters, *own))


def _choice(space: Space) -> Parameter:
    return next(p for p in space.parameters if p.name == "clip_norm")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("aux_weight",), "aux_weight goes to the task, which has no `probe_loss`: if it changes"),
        (
            ("aux_weight", "width"),
            "aux_weight, width go to the task, which has no `probe_loss`: if one of them changes",
        ),
    ],
)
def test_a_setting_of_the_task_is_warned_of_unless_the_task_has_a_probe_loss(
    names: tuple[str, ...], said: str
) -> None:
    plain = make_space()
    rows = searched(plain, (0.9, config(0.3)))

    def measured(*, has_probe_loss: bool | None) -> list[TrialRow]:
        return [
            replace(row, summary=replace(row.summary, has_probe_loss=has_probe_loss))
            for row in rows
        ]

    space = with_task_settings(*names)
    (sentence,) = loss_may_differ(space, measured(has_probe_loss=False))
    assert sentence.startswith(said)
    assert loss_may_differ(space, measured(has_probe_loss=True)) == ()
    assert loss_may_differ(space, measured(has_probe_loss=None)) == ()
    assert loss_may_differ(plain, measured(has_probe_loss=False)) == ()
