"""What the README of `stability_search.diagnose` lists is what there is."""

import re
from pathlib import Path

import pytest

import stability_search.diagnose
from stability_search.diagnose import batch_statistics as statistics
from stability_search.diagnose import overfit, rungs, verdict
from stability_search.diagnose.document import SCHEMA

FOLDER = Path(stability_search.diagnose.__file__).parent
TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (FOLDER / link).exists()


@pytest.mark.parametrize("rung", [*rungs.CHECKLIST, rungs.LEFT_OUT], ids=lambda rung: rung.name)
def test_every_rung_of_the_checklist_is_listed(rung: rungs.Rung) -> None:
    listed = " ".join(re.findall(r"^\| (.*?) \|", TEXT, flags=re.MULTILINE))
    first, *rest = rung.title.split(", ")
    assert first in listed
    assert all(part in listed for part in rest)


@pytest.mark.parametrize("cause", [c for c in verdict.Cause if c is not verdict.Cause.INCOMPLETE])
def test_every_cause_is_explained(cause: verdict.Cause) -> None:
    is_in_table = f"| {cause.value} |" in TEXT
    assert is_in_table or f"**{cause.value}**" in TEXT


def test_thresholds_are_those_of_the_code() -> None:
    assert SCHEMA in TEXT
    assert f"over {statistics.OUTLIER_FACTOR:g} times" in TEXT
    assert f"values beyond {statistics.LARGEST_EXPECTED:g}" in TEXT
    low, high = statistics.NARROWEST_STD, statistics.WIDEST_STD
    assert f"deviation outside {low:g} to {high:g}" in TEXT
    assert f"{verdict.CLEARLY:.0%}".replace("%", " % below") in TEXT
    assert f"up to batch size {verdict.SMALL_BATCH}" in TEXT
    assert f"passed {verdict.DEGRADED_LOGITS:,.0f}" in TEXT
    assert f"a cap of {rungs.LOGIT_CAP:g}" in TEXT
    assert f"{overfit.STEPS_FACTOR} times `trial.steps`, at least {overfit.MIN_STEPS}" in TEXT
