"""What must not be read elsewhere: home directories, host names, and passwords within URLs."""

import re
from collections.abc import Mapping

_BEFORE_PATH = r"(?<![\w.~-])"
_AFTER_PATH = r"(?![\w-]|\.\w)"  # a full stop may end a sentence
_MIN_NAME = 4  # shorter host names would be replaced inside ordinary texts
# What should be escaped in a password often is not, so all up to the last @ counts, unless it
# begins like a port. A single slash: a URL that was taken for a path.
_WORD = re.compile(r"\S+")
_USER = re.compile(r"(?<=:/)(/?)(?:[^\s/?#@:]*:(?!\d{1,5}[/?#])\S*|[^\s/?#]*)@")


def without_passwords(text: str) -> str:
    """Return a text whose URLs have neither user nor password.

    Example:
        >>> without_passwords("ray: no answer from 'http://me:pw@gpu-box:8265'")
        "ray: no answer from 'http://***@gpu-box:8265'"
    """
    return _WORD.sub(_hide, text)


def _hide(word: re.Match[str]) -> str:
    """Hide what stands before an @; what comes after the last is not searched.

    There every beginning of a URL would be followed to the end of the word, and there may be as
    many as letters.
    """
    before, at, after = word[0].rpartition("@")
    return _USER.sub(r"\1***@", before + at) + after


class Privacy:
    """Replaces home directory, host names and passwords, and remembers: texts occur many times.

    Args:
        home: Home directory, shown as `~`; empty or `/` where there is none.
        aliases: What each host is called instead. A name of under four characters is replaced
            only where it is the whole text.

    Example:
        >>> privacy = Privacy(home="/home/ann", aliases={"vm-10": "node-2", "vm-1x": "node-1"})
        >>> privacy.text("vm-10: /home/ann/a, /home/anna/b, not vm-1x.")
        'node-2: ~/a, /home/anna/b, not node-1.'
    """

    def __init__(self, *, home: str, aliases: Mapping[str, str]) -> None:
        self._aliases = dict(aliases)
        self._known: dict[str, str] = {}
        home = home.rstrip("/")
        names = sorted((n for n in aliases if len(n) >= _MIN_NAME), key=lambda n: (-len(n), n))
        # In one pass: the alias of one host may be, or hold, the name of another.
        self._home = re.compile(f"{_BEFORE_PATH}{re.escape(home)}{_AFTER_PATH}") if home else None
        alternatives = "|".join(map(re.escape, names))
        self._hosts = re.compile(rf"(?<![^\W_])(?:{alternatives})(?![^\W_])") if names else None

    def text(self, text: str) -> str:
        """Return a text without them."""
        if text not in self._known:
            self._known[text] = self._without(text)
        return self._known[text]

    def _without(self, text: str) -> str:
        if text in self._aliases:
            return self._aliases[text]
        text = without_passwords(text)
        if self._home is not None:
            text = self._home.sub("~", text)
        if self._hosts is not None:
            text = self._hosts.sub(lambda found: self._aliases[found[0]], text)
        return text
