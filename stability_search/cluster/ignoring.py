"""What `.gitignore` leaves out of a package, from the top of its checkout down to each folder."""

from collections.abc import Iterator
from pathlib import Path

from pathspec import GitIgnoreSpec

_NEVER_SENT = frozenset({".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"})

_Rules = tuple[tuple[Path, GitIgnoreSpec], ...]  # of each folder that has any, the outermost first


def files_of(package: Path) -> Iterator[Path]:
    """Return a package's files that `.gitignore` does not leave out, sorted.

    Links are left out, too: what they lead to may lie anywhere.

    Args:
        package: Its folder, absolute.
    """
    folders = (package, *package.parents)
    tops = [folder for folder in folders if (folder / ".git").exists()]
    above = [folder for folder in package.parents if tops and folder.is_relative_to(tops[0])]
    rules = tuple(rule for folder in reversed(above) for rule in _rules_of(folder))
    yield from _files_below(package, rules)


def _files_below(folder: Path, rules: _Rules) -> Iterator[Path]:
    here = (*rules, *_rules_of(folder))
    for path in sorted(folder.iterdir()):
        if path.name in _NEVER_SENT or path.is_symlink() or _is_ignored(path, here):
            continue
        if path.is_dir():
            yield from _files_below(path, here)
        elif path.is_file():
            yield path


def _is_ignored(path: Path, rules: _Rules) -> bool:
    end = "/" if path.is_dir() else ""
    for folder, patterns in reversed(rules):  # the nearest has the last word
        verdict = patterns.check_file(f"{path.relative_to(folder)}{end}").include
        if verdict is not None:
            return verdict
    return False


def _rules_of(folder: Path) -> _Rules:
    file = folder / ".gitignore"
    if not file.is_file():
        return ()
    lines = file.read_text(errors="surrogateescape").splitlines()
    return ((folder, GitIgnoreSpec.from_lines(lines)),)
