"""A space file that is refused, and how its problems begin."""

from collections.abc import Callable

import pytest

from stability_search.space import Space, SpaceError

Load = Callable[..., Space]


def refused(load_text: Load, text: str | bytes, *overrides: str) -> SpaceError:
    """Load a text that must be refused."""
    with pytest.raises(SpaceError, match="nothing was started") as caught:
        load_text(text, *overrides)
    return caught.value


def heads(error: SpaceError) -> list[str]:
    """Return each problem without its excerpt."""
    return [f"{one.where}  {one.key}: {one.message}" for one in error.problems]


MINIMAL = "task: ./toy.py:Toy\nfixed: {learning_rate: 1e-3}\n"
