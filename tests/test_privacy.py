"""Homes and hosts: replaced whole, in one pass, and nothing else."""

import pytest

from stability_search.privacy import Privacy


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
