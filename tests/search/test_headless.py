"""Without a head a study ends from a thread of its own, while the main one waits in Ray's code."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.search.inline_study import write_space

pytestmark = [pytest.mark.fault, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]
# The main thread waits for what never comes; the watch's clock goes on with every look at it.
SCRIPT = """\
import sys
import threading
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from stability_search import space as spaces
from stability_search.search import head, run_directory, study
from stability_search.search.environment import describe
from stability_search.search.ledger import Ledger
from stability_search.search.news import News

head.CHECK_S = 0.001
study.HeadWatch = partial(
    head.HeadWatch, reach=lambda _address: head.Reach.GONE, clock=count(step=5).__next__
)
space = spaces.load(sys.argv[1])
facts = run_directory.study_facts(space)
where = Path(sys.argv[2])
directory = run_directory.create(
    where, space, facts=facts, environment=describe(space, "run", device="cpu")
)
ledger = Ledger.create(directory.ledger, facts)
news = News(space, lambda event: print(event.fields.get("text") or event.fields, flush=True))
cluster = SimpleNamespace(head="127.0.0.1:1", remove_folder=lambda: print("removed", flush=True))
running = study._Running(
    space, directory, ledger, command="run", news=news,
    on_lost=lambda end: print("last:", *end.lines, flush=True),
)
with running._watch_head(cluster):
    threading.Event().wait(100)
"""


def test_the_process_ends_with_exit_4_the_report_and_the_way_to_go_on(tmp_path: Path) -> None:
    space = write_space(tmp_path)
    done = subprocess.run(  # noqa: S603 - our own words
        [sys.executable, "-c", SCRIPT, str(space), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "the cluster's head, 127.0.0.1:1, has not answered for" in done.stdout
    assert "ray: the cluster's head, 127.0.0.1:1, has not answered for" in done.stdout
    assert f"go on with `stability-search resume {tmp_path / 'out'}`" in done.stdout
    assert "'exit_code': 4" in done.stdout
    assert "has not answered for 45 s. It had reached the pilot stage" in done.stdout
    told = done.stdout.count("go on with `stability-search resume")
    assert told == 3  # a message, a reason, the end
    assert "removed\n" in done.stdout
    last = done.stdout.splitlines()[-1]  # once all else is done
    assert last.startswith(
        "last: Not finished: 0 of 6 trials. Ray: the cluster's head, 127.0.0.1:1"
    )
    assert (tmp_path / "out" / "report.html").is_file()
