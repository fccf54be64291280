"""The command `doctor`: is this machine fit to run a study, or a cluster."""

from pathlib import Path
from typing import Annotated

import typer

from stability_search.cli.formats import Format, FormatOption, print_formatted
from stability_search.cli.options import Work
from stability_search.records.values import Json

_ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        help="Check a cluster instead: auto or HOST:PORT joins it and asks every node; the URL "
        "of a dashboard is only looked at.",
        show_default=False,
    ),
]


def doctor(*, chosen: FormatOption = Format.TABLE, address: _ClusterOption = None) -> Work:
    """Check this machine, or a cluster: a line per check, with the fix.

    Nothing is left behind, here or there. CSV has the checks, JSON also the nodes of a cluster.
    Exit: 0, 2 for a wrong address, or 4 if a check failed.
    """

    def work() -> int:
        from stability_search.cli import doctor as examining

        if address is None:
            checks, nodes = examining.examine(Path.cwd()), None
        else:
            from stability_search.cli.doctor_cluster import examine_cluster

            checks, nodes = examine_cluster(address)
        code, rows = examining.exit_code(checks), examining.rows(checks)
        document: dict[str, Json] = {
            "schema": examining.SCHEMA,
            "exit_code": code,
            "checks": [*rows],
        }
        lines = examining.lines(checks)
        if nodes is not None:
            from stability_search.cli import doctor_nodes

            document["nodes"] = doctor_nodes.rows(nodes)
            lines = [*doctor_nodes.table(nodes), *lines] if nodes else lines
        print_formatted(chosen, lines=lines, rows=rows, document=document)
        return code

    return work
