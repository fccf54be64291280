"""The fixtures that police leaks find each kind of leak: their twin."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKS = """
import os
import sys
import types
from pathlib import Path

import pytest


class Torch(types.ModuleType):
    dtype = "float32"
    random = types.SimpleNamespace(get_rng_state=lambda: 0, set_rng_state=lambda state: None)

    def get_default_dtype(self): return self.dtype
    def set_default_dtype(self, dtype): self.dtype = dtype
    def set_grad_enabled(self, is_on): pass
    def is_grad_enabled(self): return True
    def are_deterministic_algorithms_enabled(self): return False
    def get_num_threads(self): return 1


@pytest.fixture(scope="module", autouse=True)
def torch():
    sys.modules["torch"] = Torch("torch")
    yield
    del sys.modules["torch"]


def test_environment():
    os.environ["STABILITY_SEARCH_LEAK"] = "1"

def test_default_dtype():
    sys.modules["torch"].set_default_dtype("float64")

def test_file():
    Path("left.txt").write_text("x")

def test_ray():
    ray = types.ModuleType("ray")
    ray.is_initialized = lambda: True
    ray.shutdown = lambda: sys.modules.pop("ray")
    sys.modules["ray"] = ray

def test_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("STABILITY_SEARCH_LEAK", "1")
    (tmp_path / "fine.txt").write_text("x")
"""


def test_every_kind_of_leak_fails_the_test_that_made_it(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(pytester.path))
    pytester.makeconftest((Path(__file__).parent / "conftest.py").read_text())
    pytester.makepyfile(LEAKS)

    result = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-q", "--import-mode=importlib"
    )

    result.assert_outcomes(passed=5, errors=4)
    text = result.stdout.str()
    assert "environment variables changed: STABILITY_SEARCH_LEAK" in text
    assert "torch was left with another default dtype" in text
    assert "left.txt" in text
    assert "a live Ray was left behind" in text
