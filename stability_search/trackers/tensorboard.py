"""TensorBoard: an event file per trial below `RUN/tensorboard/`, with its HParams.

A trial has ended when it is logged, so its file is written whole, under a name of its own that
holds no host, and writing it again changes nothing.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping

from tensorboardX.proto.api_pb2 import (
    DATA_TYPE_BOOL,
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_FAILURE,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import text

from stability_search.files import write_whole
from stability_search.records.trial import Outcome, Stage
from stability_search.records.values import Scalar
from stability_search.space import Parameter
from stability_search.trackers.base import StudyEnd, StudyLog, TrialLog, shown

FOLDER = "tensorboard"
METRICS = ("q", "probe_last", "num_bad_steps", "num_steps", "evidence", "grad_norm_max")
_FILE_NAME = "events.out.tfevents.0000000000"  # TensorBoard looks for `tfevents`
_PLUGIN = "hparams"


class TensorBoardTracker:
    """Writes event files."""

    def begin(self, study: StudyLog) -> frozenset[str]:
        """Write which settings and metrics the HPARAMS tab has, and find the trials there are."""
        self._folder = study.directory / FOLDER
        self._kinds = {one.name: _kind(one) for one in study.parameters}
        self._nullable = {one.name for one in study.parameters if None in one.choices}
        experiment = Experiment(
            name=study.name,
            hparam_infos=[_info(parameter) for parameter in study.parameters],
            metric_infos=[
                MetricInfo(name=MetricName(tag=f"trial/{name}"), display_name=name)
                for name in METRICS
            ],
        )
        data = HParamsPluginData(experiment=experiment)
        self._folder.mkdir(exist_ok=True)
        events = [Event(summary=_hparams_summary("_hparams_/experiment", data))]
        write_whole(self._folder / _FILE_NAME, _encoded(events))
        return frozenset(path.parent.name for path in self._folder.glob(f"*/{_FILE_NAME}"))

    def add_trial(self, trial: TrialLog) -> None:
        """Write the file of one trial."""
        folder = self._folder / trial.name
        folder.mkdir(exist_ok=True)
        write_whole(folder / _FILE_NAME, _encoded(self._trial_events(trial)))

    def finish(self, end: StudyEnd) -> None:
        """Write the verdict as text, in a run of its own."""
        lines = [f"verdict: {end.verdict}", *([end.reason] if end.reason else [])]
        lines += [f"choice: {end.choice}"] if end.choice else []
        lines += [f"margin: {end.margin}"] if end.margin else []
        lines += [f"{name}: {value:g}" for name, value in end.numbers.items()]
        lines += [f"{name}: {shown(value)}" for name, value in end.settings.items()]
        lines += [f"see {', '.join(path.name for path in end.files)} beside this folder"]
        folder = self._folder / "verdict"
        folder.mkdir(exist_ok=True)
        said = "\n".join(f"    {line}" for line in lines)  # indented: Markdown reads nothing in it
        write_whole(folder / _FILE_NAME, _encoded([Event(summary=text("verdict", said))]))

    def stop(self) -> None:
        """Write nothing: no file says that a study runs."""

    def close(self) -> None:
        """Leave nothing open: every file was written whole."""

    def _trial_events(self, trial: TrialLog) -> Iterator[Event]:
        is_session = trial.stage == Stage.SEARCH
        if is_session:
            start = SessionStartInfo(
                group_name=trial.name, monitor_url="", start_time_secs=trial.started_s
            )
            for name, value in self._hparams(trial.settings):
                _put(start, name, value)
            data = HParamsPluginData(session_start_info=start)
            yield Event(
                wall_time=trial.started_s,
                summary=_hparams_summary("_hparams_/session_start_info", data),
            )
        for point in trial.curve:
            yield _scalars(point.values, step=point.step, time_s=point.time_s)
        numbers = {f"trial/{name}": value for name, value in trial.numbers.items()}
        yield _scalars(numbers, step=trial.num_steps, time_s=trial.ended_s)
        if is_session:
            is_good = trial.outcome == Outcome.COMPLETED
            end = SessionEndInfo(
                status=STATUS_SUCCESS if is_good else STATUS_FAILURE, end_time_secs=trial.ended_s
            )
            yield Event(
                wall_time=trial.ended_s,
                summary=_hparams_summary(
                    "_hparams_/session_end_info", HParamsPluginData(session_end_info=end)
                ),
            )

    def _hparams(self, settings: Mapping[str, Scalar]) -> Iterator[tuple[str, Scalar]]:
        """Yield the settings that vary; an inactive one is left out unless null is a choice."""
        for name, kind in self._kinds.items():
            value = settings.get(name)
            if value is None and name not in self._nullable:
                continue
            yield name, shown(value) if kind == DATA_TYPE_STRING else value


def _kind(parameter: Parameter) -> int:
    if parameter.kind != "choice":
        return int(DATA_TYPE_FLOAT64)
    if all(isinstance(choice, bool) for choice in parameter.choices):
        return int(DATA_TYPE_BOOL)
    if all(_is_number(choice) for choice in parameter.choices):
        return int(DATA_TYPE_FLOAT64)
    return int(DATA_TYPE_STRING)  # null among them, or words: TensorBoard knows no mixed type


def _info(parameter: Parameter) -> HParamInfo:
    kind = _kind(parameter)
    info = HParamInfo(name=parameter.name, type=kind)
    if parameter.kind != "choice":
        info.domain_interval.min_value = parameter.low
        info.domain_interval.max_value = parameter.high
        return info
    for choice in parameter.choices:
        value = info.domain_discrete.values.add()
        if kind == DATA_TYPE_STRING:
            value.string_value = shown(choice)
        elif kind == DATA_TYPE_BOOL:
            value.bool_value = bool(choice)
        else:
            value.number_value = float(choice)  # type: ignore[arg-type]
    return info


def _put(start: SessionStartInfo, name: str, value: Scalar) -> None:
    if isinstance(value, bool):
        start.hparams[name].bool_value = value
    elif isinstance(value, int | float):
        start.hparams[name].number_value = float(value)
    else:
        start.hparams[name].string_value = shown(value)


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _scalars(values: Mapping[str, float], *, step: int, time_s: float) -> Event:
    cells = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    return Event(wall_time=time_s, step=step, summary=Summary(value=cells))


def _hparams_summary(tag: str, data: HParamsPluginData) -> Summary:
    plugin = SummaryMetadata.PluginData(plugin_name=_PLUGIN, content=data.SerializeToString())
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])


def _encoded(events: Iterable[Event]) -> bytes:
    """Return an event file: records of a length, its checksum, the event and its checksum."""
    chunks = []
    for event in (Event(file_version="brain.Event:2"), *events):
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        chunks += [length, _checksum(length), data, _checksum(data)]
    return b"".join(chunks)


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
