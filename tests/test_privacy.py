"""Homes and hosts: replaced whole, in one pass, and nothing else."""

import time

import pytest

from stability_search.privacy import Privacy, without_passwords


@pytest.mark.parametrize(
    ("home", "text", "shown"),
    [
        ("/root", "/rootfs/data", "/rootfs/data"),
        ("/ann", "/mnt/ann/data", "/mnt/ann/data"),
        ("/ann", "./ann/data", "./ann/data"),
        ("/home/ann/", "in /home/ann.", "in ~."),
        ("/home/ann", "/home/ann.old /home/ann-2", "/home/ann.old /home/ann-2"),
        ("/home/ann", "--out=/home/ann/x '/home/ann/y' file:///home/ann",
         "--out=~/x '~/y' file://~"),
        ("/", "/data", "/data"),
        ("", "/data", "/data"),
    ],
)  # fmt: skip
def test_a_home_is_replaced_where_it_is_one(home: str, text: str, shown: str) -> None:
    assert Privacy(home=home, aliases={}).text(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("worker-1 and worker-10", "node-1 and node-2"),
        ("on worker-1-b.", "on node-5."),
        ("worker-100", "worker-100"),  # not known, and not node-1 with two digits
        ("worker-1.lab.example:80", "node-1.lab.example:80"),
        ("10.0.0.1, 10.0.0.12 and 110.0.0.1", "worker-1, node-3 and 110.0.0.1"),
        ("gpu", "node-4"),
        ("a gpu was lost", "a gpu was lost"),
    ],
)
def test_hosts_are_replaced_whole_and_once(text: str, shown: str) -> None:
    """An alias may be another host's name and is not replaced again."""
    aliases = {"worker-1": "node-1", "worker-10": "node-2", "10.0.0.1": "worker-1",
               "10.0.0.12": "node-3", "gpu": "node-4", "worker-1-b": "node-5"}  # fmt: skip
    assert Privacy(home="/root", aliases=aliases).text(text) == shown


def seconds_for(text: str) -> float:
    """Return what hiding passwords costs the processor."""
    began = time.process_time()
    without_passwords(text)
    return time.process_time() - began


@pytest.mark.parametrize("piece", [":/:", "://a:b", "://a:1/", ":/"])
def test_a_text_that_is_made_to_be_slow_costs_about_as_much_as_any(piece: str) -> None:
    """It would be a thousand times as much if every beginning were followed to the end."""
    usual = "http://me:secret@host/x " * 8_000
    assert seconds_for(piece * (len(usual) // len(piece))) < 50 * seconds_for(usual)


@pytest.mark.parametrize("piece", [":/:", "://a:b", "://me:canary@", ":/"])
def test_passwords_in_such_a_text_are_hidden(piece: str) -> None:
    shown = without_passwords(f"{piece * 1000}http://me:canary@host/{':/:' * 1000}")
    assert "canary" not in shown
    assert shown.endswith(f"***@host/{':/:' * 1000}")
