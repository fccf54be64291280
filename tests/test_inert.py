"""One rule for every exit: what cannot be seen is spelled out, and Markdown stays text."""

import sys
import unicodedata

import pytest

from stability_search.inert import (
    inert,
    is_in_sight,
    markdown,
    markdown_block,
    markdown_code,
    plain,
)
from tests.hostile_strings import HOSTILE_STRINGS

UNSEEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
BLANKS = "\u034f\u115f\u1160\u17b4\u180b\u180f\u2800\u3164\ufe00\ufe0f\uffa0\U000e0100\U000e01ef"


def test_what_unicode_calls_a_control_a_format_or_a_lone_surrogate_is_out_of_sight() -> None:
    unseen = [
        char
        for char in map(chr, range(0x30000))  # the planes that have letters
        if unicodedata.category(char) in UNSEEN_CATEGORIES
    ]
    assert len(unseen) > 10_000
    assert not any(map(is_in_sight, unseen))
    assert not is_in_sight(chr(sys.maxunicode))


@pytest.mark.parametrize("char", BLANKS, ids=ascii)
def test_a_letter_that_shows_nothing_is_spelled_out_though_it_is_printable(char: str) -> None:
    assert char.isprintable()
    assert inert(f"a{char}b") == f"a{char.encode('unicode_escape').decode()}b"


@pytest.mark.parametrize("text", ["", "plain words", "\u00e9\u4e2d\u0416 \U0001f600", "a\\x1bb"])
def test_what_can_be_seen_stays_as_it_is(text: str) -> None:
    assert is_in_sight(text)
    assert inert(text) == text


@pytest.mark.parametrize("keeps", ["", "\n", "\n\t"], ids=ascii)
def test_every_hostile_text_is_in_sight_and_stays_so_a_second_time(keeps: str) -> None:
    for text in HOSTILE_STRINGS:
        shown = inert(text, keeps=keeps)
        assert is_in_sight(shown.translate(dict.fromkeys(map(ord, keeps)))), ascii(text)
        assert inert(shown, keeps=keeps) == shown
        shown.encode()  # no lone surrogate


def test_text_of_several_lines_keeps_its_lines_however_they_end() -> None:
    assert inert("a\r\nb\rc\td\n", keeps="\n") == "a\nb\\rc\\td\n"
    assert inert("a\r\nb") == "a\\r\\nb"


def test_two_names_that_differ_only_in_what_is_unseen_look_different_in_every_form() -> None:
    for show in (inert, plain, markdown, markdown_code):
        assert show("teacher") != show("teac\u200bher"), show


def test_a_sentence_is_one_line_and_a_blank_of_any_width_one_space() -> None:
    for text in HOSTILE_STRINGS:
        shown = plain(text)
        assert is_in_sight(shown), ascii(text)
        assert shown == " ".join(shown.split()) == plain(shown)
    assert plain(" a\u00a0\u3000b\r\n\x1bc ") == "a b \\x1bc"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>`x`\n@you http://z", "&lt;b&gt;\\`x\\` &#64;you http&#58;//z"),
        ("see www.evil.example", "see www&#46;evil.example"),  # a link to many a renderer
        ("- item", "\\- item"),
        ("12) item", "12\\) item"),
        ("3.14", "3.14"),
        ("closes #1", "closes \\#1"),
        ("&lt;", "&amp;lt;"),
        ("\x1b[31m", "\\\\x1b\\[31m"),
    ],
    ids=ascii,
)
def test_markdown_shows_text_as_it_is(text: str, shown: str) -> None:
    assert markdown(text) == shown


def test_code_and_blocks_have_more_backticks_than_their_text() -> None:
    assert markdown_code("a``b") == "```a``b```"
    assert markdown_code("`") == "`` ` ``"
    assert markdown_code("\n") == ""  # two backticks would open a span, not be one
    assert markdown_block(["a", "```"], "yaml") == ["````yaml", "a", "```", "````"]
    assert markdown_block(["a\n```\u202e"]) == ["````", "a\\n```\\u202e", "````"]
