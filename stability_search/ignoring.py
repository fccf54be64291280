"""What does not leave this machine: what git ignores, links, and names of secrets."""

import contextlib
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from pathspec import GitIgnoreSpec

# Names of files that hold passwords and keys by custom; whoever needs one there names it anew.
_SECRETS = GitIgnoreSpec.from_lines(
    [
        *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".pypirc", ".npmrc"),
        *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg"),
        *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".git-credentials", ".htpasswd"),
        *("auth_token", "credentials.json", "client_secret*.json", "service[-_]account*.json"),
        *(".aws/", ".azure/", ".docker/", ".gcloud/", ".gnupg/", ".kube/", ".ray/", ".ssh/"),
    ]
)

_UNWRITABLE = re.compile(r"[^\S ]|[\ud800-\udfff]")  # in a line of a `.gitignore`; `?` is any
_SPECIAL = re.compile(r"[\\*\[!# ]")

_Rules = tuple[tuple[Path, GitIgnoreSpec], ...]  # of each folder that has any, the outermost first


class Why(StrEnum):
    """Why a file or folder is kept back; reads on from its name."""

    IGNORED = "git ignores it"
    LINK = "it is a link"
    NAME = "it is named like a password or key"


class Sieve:
    """Says what of a folder may leave this machine.

    What git ignores there is what the `.gitignore` of every folder from the top of the checkout
    names, and its `info/exclude`; files that the user's git ignores everywhere are not looked up.
    Where git ignores the folder as a whole, as it often does a run directory, nothing above it
    counts: whoever names it means it.

    Args:
        folder: The folder; a link to it is followed.
    """

    def __init__(self, folder: Path) -> None:
        self._named, self._real = folder, folder.resolve()
        self._rules = {self._real: _rules_down_to(self._real)}

    def why_not(self, path: Path) -> Why | None:
        """Return why a file or folder is kept back; None if it is not.

        Args:
            path: Its path, in the folder or below it; nothing above it is kept back.
        """
        place = self._real / path.relative_to(self._named)
        if _is_ignored(place, self._rules_in(place.parent)):
            return Why.IGNORED
        if place.is_symlink():  # it may lead anywhere
            return Why.LINK
        name = place.name.lower()
        is_secret = _SECRETS.match_file(f"{name}/" if place.is_dir() else name)
        return Why.NAME if is_secret else None

    def _rules_in(self, folder: Path) -> _Rules:
        if folder not in self._rules:
            self._rules[folder] = (*self._rules_in(folder.parent), *_rules_of(folder))
        return self._rules[folder]


def as_patterns(paths: Iterable[str]) -> str:
    """Return the text of a `.gitignore` that ignores these paths of its folder."""
    lines = (_SPECIAL.sub(r"\\\g<0>", _UNWRITABLE.sub("?", path)) for path in sorted(paths))
    return "".join(f"/{line}\n" for line in lines)


def _rules_down_to(folder: Path) -> _Rules:
    above = (folder, *folder.parents)
    top = next((place for place in above if (place / ".git").exists()), folder)
    rules = _rules_from(_exclude_file(top), top)
    for place in reversed(above[: above.index(top) + 1]):
        if place != top and _is_ignored(place, rules):
            rules = ()
        rules += _rules_of(place)
    return rules


def _is_ignored(path: Path, rules: _Rules) -> bool:
    end = "/" if path.is_dir() and not path.is_symlink() else ""
    for folder, patterns in reversed(rules):  # the nearest has the last word
        verdict = patterns.check_file(f"{path.relative_to(folder)}{end}").include
        if verdict is not None:
            return verdict
    return False


def _exclude_file(top: Path) -> Path:
    """Return a checkout's own list of ignored files; a worktree has that of its repository."""
    place = top / ".git"
    with contextlib.suppress(OSError):
        if place.is_file():
            place = top / place.read_text(errors="surrogateescape").partition(":")[2].strip()
            place /= (place / "commondir").read_text(errors="surrogateescape").strip()
    return place / "info" / "exclude"


def _rules_of(folder: Path) -> _Rules:
    return _rules_from(folder / ".gitignore", folder)


def _rules_from(file: Path, folder: Path) -> _Rules:
    if not file.is_file():
        return ()
    # As git does: a byte-order mark is no part of the first pattern.
    lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    return ((folder, GitIgnoreSpec.from_lines(filter(_is_pattern, lines))),)


def _is_pattern(line: str) -> bool:
    """Say whether a line can be understood; git passes over one that cannot, too."""
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True
