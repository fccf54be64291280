"""A small task file and a valid space file beside it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stability_search.space import Space, load

TASK = '''\
"""Never imported: importing it would end the test."""

raise SystemExit("validate must not import a task")


class Toy:
    def __init__(self, *, hidden: int = 64, dropout: float = 0.1, mode: str = "plain") -> None:
        pass


class Needy:
    def __init__(self, path, hidden=64):
        pass


class Open:
    def __init__(self, hidden=64, **others):
        pass


class Heir(Toy):
    pass


class Stranger(Elsewhere):
    pass


@dataclass(frozen=True)
class Data:
    path: str
    size: int = 3
    cache: dict = field(init=False)


class Clash:
    def __init__(self, seed=0, batch_size=2, metric_loss=1):
        pass
'''

VALID = """\
# A space for tests.
task: ./toy.py:Toy
task_args: {hidden: 32}
trial:
  steps: 50    # short
  timeout_s: 100
fixed:
  batch_size: 2
space:
  learning_rate: {loguniform: {low: 1e-4, high: 0.3}}
  precision: {choice: [fp32, bf16, fp16]}
  init_scale: {choice: [1024, 65536], when: {precision: fp16}}
  clip_norm: {choice: [null, 0.5, 1]}  # null is off
  dropout: {uniform: {low: 0.0, high: 0.5}}
  accumulation_steps: {int: {low: 1, high: 4}}
start_with:
  - {learning_rate: 1e-3, precision: fp16, init_scale: 1024, clip_norm: 1}
search: {trials: 12}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder with the task file, which is the current one."""
    (tmp_path / "toy.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def valid() -> str:
    """Return the text of a valid file."""
    return VALID


@pytest.fixture
def load_text(folder: Path) -> Callable[..., Space]:
    """Return a function that writes a text to `x.yaml` and loads it."""

    def load_it(text: str | bytes, *overrides: str, name: str = "x.yaml") -> Space:
        data = text.encode() if isinstance(text, str) else text
        (folder / name).write_bytes(data)
        return load(name, overrides)

    return load_it
