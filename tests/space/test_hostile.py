"""Any bytes give a space or a `SpaceError`, soon."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stability_search.errors import Problem
from stability_search.space import Space, SpaceError, json_schema, load
from stability_search.space.reading import read_tree, resolve_scalar
from stability_search.space.tree import Problems
from stability_search.space.writing import to_yaml

Load = Callable[..., Space]

FUZZ = settings(
    max_examples=60,
    deadline=None,  # the machine may be busy; slow files are tested one by one below
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

PIECES = [
    *"[]{}:,-?&*!|>'\"%@`#~\n\t \0",
    "null", "None", ".nan", "1e400", "-1", "0", "99999999999999999999", "\r\n", "\u2028", "\x85",
    "<<: ", "!!python/object ", "&a ", "*a", "---\n", "...\n", "choice", "when", "uniform",
    "\\ud800", '"\\U00110000"', '"\\x', "- ", "? ", ": ", "{low: 1, high: 0}", "\ufeff",
    "\U0001f600",
    "0x", "1_000", "2001-99-99", "task: ", "learning_rate: ",
]  # fmt: skip


def answered(load_text: Load, text: str | bytes, *overrides: str) -> None:
    """Load a text that may be right or wrong, but must be answered."""
    problems: tuple[Problem, ...] = ()
    try:
        space = load_text(text, *overrides)
    except SpaceError as error:
        problems = error.problems
        places = [one.where.startswith(("x.yaml:", "--set ")) for one in problems]
    else:
        places = [True]
        assert space.pilot_learning_rates()
        assert space.config_id(space.pilot_settings())
    assert places
    assert all(places), problems


@FUZZ
@given(seed=st.integers(0, 2**32), edits=st.integers(1, 4))
def test_mutations_of_a_right_file_are_answered(
    load_text: Load, valid: str, seed: int, edits: int
) -> None:
    rng = random.Random(seed)  # noqa: S311  (nothing secret)
    text = valid
    for _ in range(edits):
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.choice([0, 0, 1, 3, 8, 40]))
        text = text[:start] + rng.choice(PIECES) + text[end:]
    answered(load_text, text)


@FUZZ
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200)))
def test_any_text_is_answered(load_text: Load, text: str | bytes) -> None:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    answered(load_text, data)


@FUZZ
@given(
    key=st.sampled_from(
        [
            "trial.steps",
            "space.clip_norm",
            "start_with.0",
            "fixed",
            "task",
            "name",
            "task_args",
            "",
        ]
    ),
    value=st.one_of(st.sampled_from(PIECES), st.text(max_size=30)),
)
def test_any_override_is_answered(load_text: Load, valid: str, key: str, value: str) -> None:
    answered(load_text, valid, f"{key}={value}")


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"]), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc:# -", max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(_JSON)
def test_what_we_write_reads_back_the_same(value: object) -> None:
    text = to_yaml({"value": value})  # type: ignore[dict-item]
    problems = Problems("x", text)
    tree = read_tree(text, problems)
    assert problems.found == ()
    assert tree is not None
    assert repr(tree.plain()) == repr({"value": value})


@FUZZ
@given(data=st.data())
def test_files_from_our_own_schema_are_answered(load_text: Load, data: st.DataObject) -> None:
    keys = list(json_schema()["properties"])
    chosen = data.draw(st.lists(st.sampled_from(keys), unique=True))
    file = {"task": "./toy.py:Toy", "fixed": {"learning_rate": 1}}
    answered(load_text, to_yaml({**file, **{key: data.draw(_JSON) for key in chosen}}))


BOMBS = {
    "aliases": "a: &a [x, x]\n" + "".join(f"k{i}: &k{i} [*a, *a]\n" for i in range(2000)),
    "brackets": "[" * 100_000,
    "brackets that fit": "[" * 65_000,
    "braces": "{" * 65_000,
    "dashes": "- " * 32_000,
    "questions": "? " * 32_000,
    "flat list": "a: [" + "1," * 32_000 + "]",
    "lines": "a:\n" + "  b\n" * 16_000,
    "comments": "# c\n" * 16_000,
    "keys": "".join(f"k{i}: 1\n" for i in range(6_000)),
    "long integer": "seed: " + "9" * 60_000,
    "long float": "seed: 1" + "e1" * 30_000,
    "long word": "task: " + "a" * 60_000,
    "quotes": "'" * 65_000,
    "escapes": '"' + "\\n" * 32_000,
    "unknown keys": "task: x\nfixed:\n" + "".join(f"  learning_rat{i}: 1\n" for i in range(1_600)),
    "colons": "a" + ":" * 65_000,
    "anchors": "&a " * 20_000,
    "tags": "!!str " * 10_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_two_seconds(load_text: Load, name: str) -> None:
    start = time.process_time()
    with pytest.raises(SpaceError, match="nothing was started"):
        load_text(BOMBS[name])
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("depth", [500, 5_000])
def test_a_task_file_that_is_nested_deep_is_answered(
    load_text: Load, folder: Path, depth: int
) -> None:
    (folder / "deep.py").write_text("class Toy:\n    x = " + "(" * depth + ")" * depth + "\n")
    with pytest.raises(SpaceError, match="the task cannot be read"):
        load_text("task: ./deep.py:Toy\nfixed: {learning_rate: 1}\n")


def test_a_task_file_that_is_no_text_is_answered(load_text: Load, folder: Path) -> None:
    for data in (b"\0", b"\xff\xfe", b"class Toy(\n"):
        (folder / "deep.py").write_bytes(data)
        with pytest.raises(SpaceError, match="the task cannot be read"):
            load_text("task: ./deep.py:Toy\nfixed: {learning_rate: 1}\n")


def test_loading_executes_nothing(load_text: Load, valid: str) -> None:
    load_text(valid)  # its task file raises SystemExit when imported
    with pytest.raises(SystemExit, match="must not import"):
        exec(compile(Path("toy.py").read_text(), "toy.py", "exec"), {})  # noqa: S102  (the twin)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("1e-4", 1e-4), ("+1", 1), ("010", 10), ("0o10", 8), ("0x1F", 31), (".5", 0.5),
        ("1.", 1.0), ("true", True), ("FALSE", False), ("~", None), ("", None), ("yes", "yes"),
        ("off", "off"), ("None", "None"), ("1_000", "1_000"), ("2001-01-01", "2001-01-01"),
        ("1:30", "1:30"), ("-", "-"), ("nan", "nan"), ("0b1", "0b1"), ("1\n", "1\n"),
    ],
)  # fmt: skip
def test_words_are_read_as_yaml_1_2_does(word: str, value: object) -> None:
    assert repr(resolve_scalar(word)) == repr(value)


def test_directories_and_missing_files_are_answered(folder: Path) -> None:
    for name in (".", str(folder), "no/such/file.yaml", "x" * 5000):
        with pytest.raises(SpaceError, match="no such space file"):
            load(name)
