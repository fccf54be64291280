"""What is left out of a package: what git ignores in its checkout, and files of secrets."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

_NEVER_SENT = frozenset({".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"})
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

_Rules = tuple[tuple[Path, GitIgnoreSpec], ...]  # of each folder that has any, the outermost first


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageFiles:
    """The files of a package.

    Attributes:
        sent: Those to be sent, sorted; no link among them, which may lead anywhere.
        secrets: Files and folders that git does not ignore, but whose names are those of secrets.
    """

    sent: tuple[Path, ...]
    secrets: tuple[Path, ...]


def files_of(package: Path) -> PackageFiles:
    """Return a package's files, without what its checkout ignores.

    That is what the `.gitignore` of every folder from the top of the checkout names, and its
    `info/exclude`; files that the user's git ignores everywhere are not left out.

    Args:
        package: Its folder, absolute.

    Raises:
        OSError: A folder cannot be read.
    """
    folders = (package, *package.parents)
    tops = [folder for folder in folders if (folder / ".git").exists()]
    above = [folder for folder in package.parents if tops and folder.is_relative_to(tops[0])]
    rules = _rules_in(_exclude_file(tops[0]), tops[0]) if tops else ()
    rules += tuple(rule for folder in reversed(above) for rule in _rules_of(folder))
    sent: list[Path] = []
    secrets: list[Path] = []
    _sort_files(package, rules, sent, secrets)
    return PackageFiles(sent=tuple(sent), secrets=tuple(secrets))


def _sort_files(folder: Path, rules: _Rules, sent: list[Path], secrets: list[Path]) -> None:
    here = (*rules, *_rules_of(folder))
    for path in sorted(folder.iterdir()):
        if path.name in _NEVER_SENT or path.is_symlink() or _is_ignored(path, here):
            continue
        if _SECRETS.match_file(f"{path.name}/" if path.is_dir() else path.name):
            secrets.append(path)
        elif path.is_dir():
            _sort_files(path, here, sent, secrets)
        elif path.is_file():
            sent.append(path)


def _is_ignored(path: Path, rules: _Rules) -> bool:
    end = "/" if path.is_dir() else ""
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
    return _rules_in(folder / ".gitignore", folder)


def _rules_in(file: Path, folder: Path) -> _Rules:
    if not file.is_file():
        return ()
    lines = file.read_text(errors="surrogateescape").splitlines()
    return ((folder, GitIgnoreSpec.from_lines(filter(_is_pattern, lines))),)


def _is_pattern(line: str) -> bool:
    """Say whether a line can be understood; git passes over one that cannot, too."""
    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True
