"""Texts: where they come from, how they are split, and clear words about a folder of mistakes."""

import re
import sys
from pathlib import Path

import pytest
import torch

from stability_search.errors import UsageError
from stability_search.tasks import texts
from stability_search.tasks.speech_gpt import SpeechGpt
from stability_search.tasks.texts import (
    read_python_documentation,
    read_text_folder,
    tokenize,
)
from stability_search.testing import check_task

ETHIOPIC = (0x1200, 0x1248)  # syllables
SALAM = "\u1230\u120b\u121d"


def amharic(num_words: int, seed: int = 0) -> str:
    """Write sentences of made-up words in Ethiopic letters."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(*ETHIOPIC, (24, 3), generator=torch.Generator().manual_seed(0))
    words = ["".join(map(chr, word)) for word in letters.tolist()]
    picks = torch.randint(len(words), (num_words,), generator=generator).tolist()
    return " ".join(words[pick] + "\u1362" * (pick % 5 == 0) for pick in picks)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(amharic(1500, len(name)), encoding="utf-8")
    return tmp_path


def test_amharic_is_a_task(folder: Path) -> None:
    task = SpeechGpt(data_dir=str(folder), width=16, layers=1, heads=2, context=16, vocabulary=320)
    assert check_task(task) == ()
    assert not [finding for batch in task.probe() for finding in task.check_batch(batch)]
    assert task.baseline() < 5.0


def test_the_last_tenth_of_each_text_is_held_out() -> None:
    streams = tokenize(["a" * 90 + "b" * 10, "c" * 90 + "d" * 10], vocabulary=256, context=2)
    assert bytes(streams.train.tolist()) == b"a" * 90 + b"\n\n" + b"c" * 90
    assert bytes(streams.test.tolist()) == b"b" * 10 + b"\n\n" + b"d" * 10


def test_the_tokenizer_is_learned_from_the_training_part_alone() -> None:
    streams = tokenize(["xy" * 450 + "zw" * 50], vocabulary=257, context=2)
    assert streams.pairs.spellings[256] == b"xy"
    assert bytes(streams.test.tolist()) == b"zw" * 50
    assert streams.sizes.tolist() == [1] * 256 + [2]


def test_pieces_know_their_largest_id_and_their_bytes() -> None:
    streams = tokenize(["xy" * 450 + "xy" * 50], vocabulary=257, context=2)
    batch = streams.pieces(streams.test, torch.tensor([0, 5]), 2)
    assert batch.tokens.tolist() == [[256] * 3] * 2
    assert (batch.highest, batch.num_bytes) == (256, 8)


def test_the_documentation_of_this_python_is_long_enough() -> None:
    documentation = read_python_documentation()
    assert sum(map(len, documentation)) > 200_000
    assert all(documentation)


def test_a_python_without_its_documentation_asks_for_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UsageError, match=r"data_dir: a folder must be given.*UTF-8"):
        read_python_documentation()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SALAM, encoding="utf-8-sig")
    (tmp_path / "B.TXT").write_text("abc", encoding="utf-8")
    (tmp_path / "notes.md").write_bytes(b"\xff")
    assert read_text_folder(tmp_path) == ("abc", SALAM)


def test_a_folder_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a folder of \.txt files is needed.*is not there"):
        read_text_folder(tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UsageError, match=r"file\.txt is not a folder"):
        read_text_folder(tmp_path / "file.txt")


def test_a_folder_without_texts_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"holds none \(1 other entries\).*not searched"):
        read_text_folder(tmp_path)


def test_every_file_that_cannot_be_used_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text("fine", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    (tmp_path / "wide.txt").write_bytes(SALAM.encode("utf-16"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "inner.txt").mkdir()
    with pytest.raises(UsageError, match=r"of 7 in .* 6 cannot be used") as caught:
        read_text_folder(tmp_path)
    message = str(caught.value)
    for problem in (
        r"latin\.txt has 0xe9 at byte 3 \(invalid continuation byte\)",
        r"marked\.txt has 0xff at byte 5 \(invalid start byte\)",
        r"wide\.txt is UTF-16, by its first two bytes; save it as UTF-8",
        r"empty\.txt is empty",
        r"blank\.txt is blank",
        r"inner\.txt cannot be read \(Is a directory\)",
    ):
        assert re.search(problem, message), problem
    assert "fine.txt" not in message
    assert "\n" not in message


def test_a_hundred_broken_files_do_not_fill_the_screen(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"07\.txt .*; and 12 more\."):
        read_text_folder(tmp_path)


def test_too_little_text_says_how_much_is_needed(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(amharic(60), encoding="utf-8")
    with pytest.raises(UsageError, match=r"data_dir: 512 tokens .* but got \d+ to train on"):
        SpeechGpt(data_dir=str(tmp_path))


def test_the_amount_asked_for_is_enough(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(amharic(60), encoding="utf-8")
    with pytest.raises(UsageError, match="Add text") as caught:
        SpeechGpt(data_dir=str(tmp_path), context=16, vocabulary=320)
    needed = int(re.findall(r"about (\d+) bytes", str(caught.value))[0])
    text = amharic(4000)
    while len(text.encode()) > needed:
        text = text[:-100]
    (tmp_path / "short.txt").write_text(text + amharic(10), encoding="utf-8")
    SpeechGpt(data_dir=str(tmp_path), context=16, vocabulary=256)


def test_too_much_text_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_FOLDER_BYTES", 1024)
    with pytest.raises(UsageError, match=r"at most 0 MiB of text must hold.*Take a sample"):
        read_text_folder(folder)
