"""A damaged ledger is kept aside and made again when its run goes on."""

from pathlib import Path

import pytest

from stability_search import space as spaces
from stability_search.search import run_directory
from stability_search.search.ledger import DamagedLedgerError, Ledger
from stability_search.search.reopening import open_ledger
from stability_search.search.run_directory import RunDirectory
from tests.search.inline_study import write_space


def begun(folder: Path) -> RunDirectory:
    space = spaces.load(write_space(folder))
    facts = run_directory.study_facts(space)
    run = run_directory.create(folder / "out", space, facts=facts, environment={})
    Ledger.create(run.ledger, facts).close()
    return run


def test_a_whole_ledger_is_opened_without_a_word(tmp_path: Path) -> None:
    ledger = open_ledger(begun(tmp_path), pytest.fail)
    assert ledger.facts()["name"] == "tiny"


def test_a_damaged_one_is_kept_and_made_again_and_that_is_told(tmp_path: Path) -> None:
    run, told = begun(tmp_path), list[str]()
    run.ledger.write_bytes(b"no ledger")
    ledger = open_ledger(run, told.append)
    assert ledger.facts()["name"] == "tiny"
    assert (run.path / "study.db.damaged-1").read_bytes() == b"no ledger"
    (line,) = told
    assert "made again from 0 step files; the old one is kept as study.db.damaged-1." in line


def test_it_stays_as_it_is_where_the_facts_are_lost_too(tmp_path: Path) -> None:
    run = begun(tmp_path)
    run.ledger.write_bytes(b"no ledger")
    run.environment.unlink()
    with pytest.raises(DamagedLedgerError, match="damaged ledger"):
        open_ledger(run, pytest.fail)
    assert run.ledger.read_bytes() == b"no ledger"
