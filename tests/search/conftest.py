"""Spaces to sample from."""

import functools
from collections.abc import Callable

import pytest

from stability_search.settings.study import SamplerName
from stability_search.space import Space, load
from tests.search.sampled import SPACE


@pytest.fixture(scope="module")
def make_space(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Space]:
    """Return what makes a space of a text, once a module."""
    folder = tmp_path_factory.mktemp("spaces")

    @functools.cache
    def make(text: str = SPACE, *, seed: int = 0, sampler: SamplerName = "tpe") -> Space:
        path = folder / "space.yaml"
        path.write_text(text)
        return load(path, [f"seed={seed}", f"search.sampler={sampler}"])

    return make
