"""What every test is held to: it leaves the process and the checkout as it found them."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

# Read by torch when it is imported: more threads than cores make small tests ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Modules and tests live to the end: looking through them for garbage, again and again while they
# are collected and while tests run, was a quarter of the whole suite's time.
gc.disable()

# A busy machine is no failure: pytest's time-out is the net for what hangs. The same examples in
# every run: what fails can be looked at again, and what passes does not fail elsewhere. Hypothesis
# also tries constants of the modules of ours that are loaded, which depends on the tests before.
providers._get_local_constants = lambda: providers._local_constants  # noqa: SLF001 - no setting
settings.register_profile("unhurried", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("unhurried")

ROOT = Path(__file__).resolve().parents[1]

# pytest names the running test here; Ray and torch set the others on import, once.
_VARIABLES_OF_TOOLS = ("PYTEST_", "RAY_", "KMP_", "TORCH", "GRPC_", "HYPOTHESIS_")
_FOLDERS_OF_TOOLS = {"__pycache__", "build", "dist"}


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def leaves_environment_variables_alone() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = sorted(
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not name.startswith(_VARIABLES_OF_TOOLS)
    )
    for name in changed:  # the next test must not suffer
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    if changed:
        pytest.fail(f"environment variables changed: {', '.join(changed)}")


@pytest.fixture(autouse=True)
def leaves_torch_alone() -> Iterator[None]:
    """Give every test the same random state back, and refuse a changed default."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    random_state = torch.random.get_rng_state()
    before = _torch_defaults(torch)
    yield
    after = _torch_defaults(torch)
    torch.random.set_rng_state(random_state)
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["gradients"])
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        pytest.fail(f"torch was left with another {', '.join(changed)}")


@pytest.fixture(autouse=True)
def leaves_no_file_outside_tmp_path() -> Iterator[None]:
    """Watch the folders where a wrong path lands: the checkout, its reports, where we stand."""
    folders = sorted({ROOT, ROOT / "reports", ROOT / "search_spaces", Path.cwd()})
    before = {folder: _entries(folder) for folder in folders}
    yield
    new = [str(folder / name) for folder in folders for name in _entries(folder) - before[folder]]
    if new:
        pytest.fail(f"files outside tmp_path: {', '.join(sorted(new))}")


@pytest.fixture(autouse=True)
def leaves_no_live_ray() -> Iterator[None]:
    was_live = _is_ray_live()
    yield
    if _is_ray_live() and not was_live:
        sys.modules["ray"].shutdown()
        pytest.fail("a live Ray was left behind")


def _torch_defaults(torch: object) -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "thread count": torch.get_num_threads(),
    }


def _entries(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {
        name
        for name in os.listdir(folder)  # noqa: PTH208 - names only, in one call
        if not name.startswith(".") and name not in _FOLDERS_OF_TOOLS
    }


def _is_ray_live() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
