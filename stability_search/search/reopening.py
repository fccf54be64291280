"""Opening the ledger of a run that goes on, though it may be damaged."""

from collections.abc import Callable
from typing import Any

from stability_search import space as spaces
from stability_search.records.trial import Stage, TrialRow
from stability_search.search import run_directory
from stability_search.search.ledger import DamagedLedgerError, Ledger
from stability_search.search.run_directory import RunDirectory
from stability_search.search.sampler import as_optuna, varying_values
from stability_search.space import Space


def open_ledger(directory: RunDirectory, warn: Callable[[str], None]) -> Ledger:
    """Open the ledger; where it is damaged, make it again from the step files.

    Args:
        directory: The run directory; nobody else writes to it.
        warn: Is told what was found damaged.

    Raises:
        DamagedLedgerError: It is damaged, and what it is made from is missing.
        UsageError: A newer version of the program wrote it.
    """
    try:
        return Ledger(directory.ledger)
    except DamagedLedgerError as error:
        facts = run_directory.facts_of_environment(directory)
        if facts is None:
            raise
        space = spaces.load(directory.space)
        ledger, aside, unreadable = Ledger.rebuild(
            directory.ledger,
            directory.steps,
            facts=facts,
            parameters_of=lambda row: parameters_of(space, row),
        )
        kept = f"; the old one is kept as {aside.name}" if aside else ""
        warn(f"{error.message} It was made again from {len(ledger.rows())} step files{kept}.")
        for line in unreadable:
            warn(line)
        return ledger


def parameters_of(space: Space, row: TrialRow) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return values and distributions of a search trial, as the ledger keeps them."""
    if row.stage is not Stage.SEARCH:
        return {}, {}
    return as_optuna(space, varying_values(space, row.settings))
