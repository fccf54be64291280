"""The command line: parse, call, print, exit code.

program    `main`: one exit code for every way a command can end
commands   what each command takes and prints; long ones have a file of their own:
           diagnosing, training_commands, instrumenting, status_command, dry_running,
           cluster_commands
options    the options that several commands share
printing   data on standard output
next_step  the command that a reader of a verdict wants next
completing what a shell offers for Tab
screen     a study as its reader sees it: its events, then its end
outlets    where events go: live view, plain lines or JSON lines
board      the state of a study, folded from its events
lines      events and states as lines of text
live       the board as a live view on a terminal
doctor     checks of the machine; those of tokens and dashboards stand in exposure, of a cluster
           in doctor_cluster and doctor_nodes, the command in doctor_command, what a check is in
           checks
"""

from stability_search.cli.program import main

__all__ = ["main"]
