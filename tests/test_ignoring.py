"""What of a folder may leave this machine."""

import os
from pathlib import Path

import pytest

from stability_search.ignoring import Sieve, Why, as_patterns
from stability_search.neighbours import files_in


def write(folder: Path, *names: str, **texts: str) -> Path:
    for name, text in {**dict.fromkeys(names, ""), **texts}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def left_of(folder: Path) -> list[str]:
    sieve = Sieve(folder)
    return [*files_in(folder, lambda path: sieve.why_not(path) is None)]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return an empty package in a checkout."""
    (tmp_path / ".git" / "info").mkdir(parents=True)
    return write(tmp_path / "pack", "a.py")


def test_the_nearest_gitignore_has_the_last_word(package: Path) -> None:
    write(package, "data/a.bin", "sub/drop.log", "sub/keep.log", "sub/b.py")
    (package.parent / ".gitignore").write_text("data/\n*.log\n")
    (package / "sub" / ".gitignore").write_text("!keep.log\n")

    assert left_of(package) == ["a.py", "sub/b.py", "sub/keep.log"]


def test_what_a_checkout_leaves_out_for_itself_stays(package: Path) -> None:
    write(package, "local.txt", "notes/b.md", "kept.txt")
    git = package.parent / ".git"
    (git / "info" / "exclude").write_text("# mine\nlocal.txt\n/pack/notes/\n*.txt\n")
    (package.parent / ".gitignore").write_text("!kept.txt\n")  # has the last word

    assert left_of(package) == ["a.py", "kept.txt"]


@pytest.mark.parametrize("name", [".gitignore", ".git/info/exclude"])
def test_a_byte_order_mark_is_no_part_of_the_first_pattern(package: Path, name: str) -> None:
    write(package, "secret.txt", "other.txt")
    (package.parent / name).write_bytes(b"\xef\xbb\xbfsecret.txt\nother.txt\n")

    assert left_of(package) == ["a.py"]


def test_a_worktree_has_what_its_repository_leaves_out(tmp_path: Path) -> None:
    git, tree = tmp_path / ".git", tmp_path / "tree"
    write(git, **{"info/exclude": "local.txt\n", "worktrees/tree/commondir": "../..\n"})
    write(tree, "local.txt", "b.py", **{".git": f"gitdir: {git}/worktrees/tree\n"})

    assert left_of(tree) == ["b.py"]


def test_without_a_checkout_no_folder_above_is_asked(package: Path, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.py\n")
    (tmp_path / ".git").rename(tmp_path / "git")
    assert left_of(package) == ["a.py"]

    (tmp_path / "git").rename(tmp_path / ".git")  # the twin

    assert left_of(package) == []


@pytest.mark.parametrize("pattern", ["/pack/", "/*", "**", "/pack/**", "pa*"])
def test_a_folder_that_is_ignored_as_a_whole_is_judged_by_what_is_in_it(
    package: Path, pattern: str
) -> None:
    write(package, "b.py", "sub/c.py", **{".gitignore": "b.py\n"})
    (package.parent / ".gitignore").write_text(f"{pattern}\n")

    assert left_of(package) == ["a.py", "sub/c.py"]


def test_a_link_to_the_folder_leads_to_the_same_rules(package: Path, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.log\n")
    write(package, "b.log")
    link = tmp_path.with_name(f"{tmp_path.name}-link")
    link.symlink_to(package)

    assert left_of(link) == ["a.py"]


def test_a_line_that_git_does_not_understand_leaves_out_nothing(package: Path) -> None:
    write(package, "b.log")
    (package / ".gitignore").write_bytes(b"!\n[z-a]\na\\\n\xff\n*.log\n")

    assert left_of(package) == ["a.py"]


@pytest.mark.parametrize(
    "name",
    [".env", ".env.local", "prod.env", "key.pem", "KEY.PEM", "sub/id_rsa", ".netrc", ".aws/x"],
)
def test_a_secret_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "environment.py", "keys.py")
    top = tmp_path / (name if name.startswith("sub") else name.partition("/")[0])

    assert Sieve(tmp_path).why_not(top) is Why.NAME
    assert left_of(tmp_path) == ["environment.py", "keys.py"]


def test_a_link_stays_wherever_it_leads(package: Path) -> None:
    (package / "link.py").symlink_to(package / "a.py")
    (package / "linked").symlink_to(package.parent)

    assert left_of(package) == ["a.py"]
    assert Sieve(package).why_not(package / "link.py") is Why.LINK


def test_paths_become_patterns_that_match_nothing_else(tmp_path: Path) -> None:
    odd = ["a b ", "[x].py", "!no", "#no", "st*r", "back\\slash", "li\nne", "data/x", "d/\udcff"]
    names = [*odd, "x.py", "star", "sub/#no", "other/x"]
    for name in names:
        path = os.fsencode(tmp_path / name)
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120 - no text
        with open(path, "wb"):  # noqa: PTH123 - no text
            pass
    (tmp_path / ".gitignore").write_text(as_patterns(odd))

    assert left_of(tmp_path) == ["other/x", "star", "sub/#no", "x.py"]
