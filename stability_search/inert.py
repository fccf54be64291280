r"""Strings of users, tasks and machines are hostile until they are inert: one rule for every exit.

What cannot be seen is spelled out as a backslash escape, the same everywhere: control characters
(a terminal acts on them), direction marks (text stands elsewhere than it seems to), what takes no
place or shows nothing (two names look alike), and lone surrogates (UTF-8 cannot hold them).

inert            for a terminal, a log, a cell of a spreadsheet
plain            the same on one line, for a sentence or a table
markdown         the same as text of a Markdown page
markdown_code    as a code span in it
markdown_block   as a fenced block of it

Jinja's autoescape sees to HTML, `spreadsheet` to formulas.
"""

import re
from collections.abc import Sequence

# Letters and marks for `str.isprintable`, but nothing is seen of them: fillers, variation
# selectors, joiners of combining marks, the blank Braille pattern, the blank note.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U0001d159\U000e0100-\U000e01ef]"
)
_MARKDOWN = re.compile(r"[\\`*_\[\]|~$#]")
_LINE_START = re.compile(r"^(?:[-+=]|\d{1,9}[.)](?= |$))")  # lists and underlined headings
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})
_BACKTICKS = re.compile("`+")


def is_in_sight(text: str) -> bool:
    """Return True if every character of a text can be seen, or is a space."""
    return text.isprintable() and (text.isascii() or not _BLANK.search(text))


def inert(text: str, *, keeps: str = "") -> str:
    r"""Spell out every character that cannot be seen.

    Args:
        text: Any string, lone surrogates included.
        keeps: Characters that stay as they are: a line feed for text of several lines, of which
            each may then end as on Windows.

    Returns:
        The same text with backslash escapes. It can be encoded as UTF-8.

    Example:
        >>> print(inert("a\x1b[31mb\r\n"))
        a\x1b[31mb\r\n
    """
    if is_in_sight(text):  # nearly always, and much cheaper than the loop
        return text
    if "\n" in keeps:
        text = text.replace("\r\n", "\n")
    return "".join(
        char
        if char in keeps or is_in_sight(char)
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def plain(text: str) -> str:
    r"""Return inert text on one line: white space of any kind becomes a space.

    Example:
        >>> print(plain(" one\r\n\ttwo \x1b[31m "))
        one two \x1b[31m
    """
    return inert(" ".join(text.split()))


def markdown(text: str) -> str:
    r"""Return text that Markdown and HTML show as it is on one line: no markup, link or mention.

    Example:
        >>> print(markdown("1. <b> *see* www.example.org"))
        1\. &lt;b&gt; \*see\* www&#46;example.org
    """
    escaped = _MARKDOWN.sub(r"\\\g<0>", plain(text)).translate(_ENTITIES)
    escaped = _LINE_START.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", escaped)
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;")


def markdown_code(text: str) -> str:
    """Return a code span that its text cannot close; nothing for no text."""
    shown = plain(text)
    fence = _fence(shown, 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}" if shown else ""


def markdown_block(lines: Sequence[str], language: str = "") -> list[str]:
    """Return lines as a fenced block that they cannot close.

    Args:
        lines: Text, of which every item is one line.
        language: Our own word for what they are; empty for none.
    """
    shown = [inert(line) for line in lines]
    fence = _fence("\n".join(shown), 3)
    return [f"{fence}{language}", *shown, fence]


def _fence(text: str, least: int) -> str:
    """Return more backticks than the text has in a row."""
    return "`" * max(least, 1 + max(map(len, _BACKTICKS.findall(text)), default=0))
