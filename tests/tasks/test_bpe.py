"""Byte-pair encoding: which pairs are joined, and that nothing is lost."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stability_search.tasks.bpe import NUM_BYTES, BytePairs, learn_byte_pairs

AMHARIC = (  # "All human beings are born free and equal", in Ethiopic letters
    "\u1230\u12cd \u1201\u1209 \u1290\u133b\u1293 "
    "\u12a5\u12a9\u120d \u1206\u1296 \u1270\u12c8\u120d\u12f7\u120d\u1362 "
)


def merged_by_hand(tokens: list[int], pair: tuple[int, int], new: int) -> list[int]:
    joined: list[int] = []
    at = 0
    while at < len(tokens):
        if tuple(tokens[at : at + 2]) == pair:
            joined.append(new)
            at += 2
        else:
            joined.append(tokens[at])
            at += 1
    return joined


def learned_by_hand(text: bytes, vocabulary: int) -> list[tuple[int, int]]:
    """Do the same one pair at a time, without numpy."""
    tokens, merges = list(text), []
    for new in range(NUM_BYTES, vocabulary):
        pairs = list(itertools.pairwise(tokens))
        best = min(set(pairs), key=lambda pair: (-pairs.count(pair), pair), default=None)
        if best is None or pairs.count(best) < 2:
            break
        merges.append(best)
        tokens = merged_by_hand(tokens, best, new)
    return merges


def test_the_most_frequent_pair_is_joined_first() -> None:
    pairs = learn_byte_pairs(b"abab ab cd cd", 258)
    assert pairs.merges == ((ord("a"), ord("b")), (ord(" "), ord("c")))
    assert pairs.spellings[256:] == (b"ab", b" c")
    assert pairs.encode(b"ab cab").tolist() == [256, 257, 256]


@pytest.mark.parametrize("text", [b"", b"x", b"xyz", bytes(range(256))])
def test_what_never_occurs_twice_stays_bytes(text: bytes) -> None:
    pairs = learn_byte_pairs(text, 300)
    assert pairs.vocabulary == NUM_BYTES
    assert pairs.encode(text).tolist() == list(text)


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="ab \u1230", max_size=60).map(str.encode))
def test_learning_and_encoding_are_those_of_the_textbook(text: bytes) -> None:
    pairs = learn_byte_pairs(text, 264)
    assert list(pairs.merges) == learned_by_hand(text, 264)
    expected = list(text)
    for index, pair in enumerate(pairs.merges):
        expected = merged_by_hand(expected, pair, NUM_BYTES + index)
    assert pairs.encode(text).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(text=st.binary(max_size=80))
def test_every_file_can_be_written_and_read_back(text: bytes) -> None:
    pairs = BytePairs(merges=((0, 0), (256, 256), (97, 98), (257, 0)))
    tokens = pairs.encode(text)
    assert pairs.decode(tokens) == text
    assert len(tokens) <= len(text)
    assert not len(tokens) or tokens.max() < pairs.vocabulary


def test_a_run_of_equal_bytes_is_joined_from_its_start() -> None:
    pairs = BytePairs(merges=((97, 97),))
    assert pairs.encode(b"aaaaa").tolist() == [256, 256, 97]
    assert pairs.encode(b"baabaaa").tolist() == [98, 256, 98, 256, 97]


def test_ethiopic_letters_of_three_bytes_become_tokens() -> None:
    text = (AMHARIC * 20).encode()
    pairs = learn_byte_pairs(text, 300)
    tokens = pairs.encode(text)
    assert len(tokens) < len(text) / 6
    assert pairs.decode(tokens).decode() == AMHARIC * 20
    letters = [spelling.decode("utf-8", "ignore") for spelling in pairs.spellings[256:]]
    assert "\u1230\u12cd" in "".join(letters)


def test_a_long_text_is_learned_from_all_over() -> None:
    text = np.random.default_rng(0).integers(32, 127, 300_000, dtype=np.uint8).tobytes()
    late = AMHARIC.encode() * 2000
    assert any(b"\xe1" in token for token in learn_byte_pairs(text + late, 260).spellings[256:])
