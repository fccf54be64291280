"""Studies that hold another hostile text in every place: a few pages carry all of them."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stability_search.records.step import StepLabel, StepRecord
from stability_search.records.trial import TrialRow
from stability_search.report import Report
from stability_search.table import build_tables, study_yardsticks
from tests.report.study_reports import report_of
from tests.report.study_steps import steps_of
from tests.study_rows import SPACE_SETTINGS, VARYING, StudyCase

NUM_NAMES = 6
"""Settings with hostile names that vary; each name is made of several texts."""

_GLUE = " ~ "
_TEXTS = ("reason", "first_nonfinite_module", "first_nonfinite_phase", "error_type",
          "error_place", "error_text", "device")  # fmt: skip


class Pack:
    """One study with many texts in it.

    Args:
        case: A study whose trials are renamed; has few trials but at least one.
        strings: The texts: each of them comes to stand in every place.
    """

    def __init__(self, case: StudyCase, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._num_bad = itertools.count()  # bad steps read so far: each takes the next text
        self.names = tuple(
            _whole(f"set{k}{_GLUE}{_GLUE.join(self._strings[k::NUM_NAMES])}")
            for k in range(NUM_NAMES)
        )
        lines = dict.fromkeys(map(_line, case.rows))
        self._place = {line: i for i, line in enumerate(lines)}
        rows = tuple(self._row(i, row) for i, row in enumerate(case.rows))
        verdict = replace(
            case.verdict,
            reason=self.all_of_them,
            missed=self._strings,
            warnings=self._strings,
        )
        study = replace(
            case.study, name=self.all_of_them, targets=dict.fromkeys(self._strings, 0.1)
        )
        self.case = replace(case, rows=rows, verdict=verdict, study=study)

    @property
    def all_of_them(self) -> str:
        """Every text in one."""
        return _GLUE.join(self._strings)

    def text(self, position: int) -> str:
        """Return the text of a position; neighbours differ."""
        return self._strings[position % len(self._strings)]

    def report(self) -> Report:
        """Return the report of the study."""
        names = (*SPACE_SETTINGS, *self.names)
        case = self.case
        yardsticks = study_yardsticks(case.rows, case.study)
        tables = build_tables(
            case.rows,
            space_settings=names,
            study=case.study,
            yardsticks=yardsticks,
            verdict=case.verdict,
        )
        return report_of(
            replace(case, rows=()),
            tables=tables,
            yardsticks=yardsticks,
            setting_names=names,
            varying=(*VARYING, *self.names),
            space_text="\n".join(self._strings),
            task_name=self.all_of_them,
            device=self.all_of_them,
            environment={text: [text, {text: text}] for text in self._strings},
            command=self.all_of_them,
            run_directory=f"/{self.all_of_them}",
            read_steps=self._read_steps,
            home="/home/someone",
        )

    def _row(self, i: int, row: TrialRow) -> TrialRow:
        texts = {name: self.text(i + 7 * k) for k, name in enumerate(_TEXTS)}
        place, num_places = self._place[_line(row)], len(self._place)
        settings = {**row.settings, "clip_norm": self.text(place)}
        for k, name in enumerate(
            self.names
        ):  # a few values have an effect, many are in the tables
            few = k < NUM_NAMES // 2
            settings[name] = self.text(k + place % 3 if few else k * num_places + place)
        summary = replace(
            row.summary,
            **texts,
            warnings=(self.text(i + 3), self.text(i + 5)),
            alarms={self.text(i): 2},
            metrics_first=dict.fromkeys(self._strings, 1.0),
            metrics_last=dict.fromkeys(self._strings, 0.5),
        )
        return replace(
            row,
            summary=summary,
            settings=settings,
            node=f"host-{i}-{self.text(i)}",
            trial_id=f"{row.trial_id}-{self.text(i)}",
        )

    def _read_steps(self, trial_id: str) -> list[StepRecord]:
        records = []
        for record in steps_of(self._rows_by_shown_id()[trial_id]):
            step = record
            if step.label is StepLabel.BAD:
                at = next(self._num_bad)
                step = replace(
                    step,
                    reason=self.text(at),
                    first_nonfinite_module=self.text(at),
                    first_nonfinite_phase=self.text(at),
                    loss_terms=dict.fromkeys(self._strings),
                )
            records.append(step)
        return records

    def _rows_by_shown_id(self) -> dict[str, TrialRow]:
        return {_whole(row.trial_id): row for row in self.case.rows}


def _whole(text: str) -> str:
    """Write lone surrogates out, as the tables do; a space file holds none in a name."""
    return text.encode("utf-8", "backslashreplace").decode()


def _line(row: TrialRow) -> Any:  # noqa: ANN401 - any hashable
    """Return what the rungs of a ladder share: they must keep their settings in common."""
    return tuple((name, row.settings[name]) for name in SPACE_SETTINGS if name != "learning_rate")
