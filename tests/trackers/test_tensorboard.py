import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.api_pb2 import Experiment
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData
from tensorboardX.record_writer import masked_crc32c

from stability_search.records.trial import Outcome, Stage, TrialRow
from stability_search.report.wording import number
from stability_search.trackers.run_files import RunFiles
from stability_search.trackers.tensorboard import TensorBoardTracker
from tests.report.study_steps import steps_of
from tests.trackers.fake_run import (
    NAMES,
    SEARCHED,
    file_name,
    q_of,
    rows,
    write_end,
    write_run,
    write_trial,
)

FILE = "events.out.tfevents.0000000000"


def events_in(path: Path) -> Iterator[Event]:
    """Read an event file, checksums included."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        (length_sum,) = struct.unpack("<I", data[8:12])
        body, rest = data[12 : 12 + length], data[12 + length :]
        assert length_sum == masked_crc32c(data[:8])
        assert struct.unpack("<I", rest[:4])[0] == masked_crc32c(body)
        yield Event.FromString(body)
        data = rest[4:]


def scalars_in(path: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events_in(path):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def hparams_in(path: Path) -> dict[str, HParamsPluginData]:
    return {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events_in(path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log the whole study once."""
    run = write_run(tmp_path_factory.mktemp("tensorboard") / "run")
    tracker, files = TensorBoardTracker(), RunFiles(run.path)
    assert tracker.begin(files.study("0" * 32)) == frozenset()
    for row in rows():
        write_trial(run, row)
        tracker.add_trial(files.trial(file_name(row), q_of(row)))
    write_end(run)
    tracker.finish(files.end("stable", 0))
    tracker.close()
    return run.path / "tensorboard"


def experiment_in(folder: Path) -> Experiment:
    return hparams_in(folder / FILE)["_hparams_/experiment"].experiment


def trial(outcome: Outcome) -> TrialRow:
    return next(row for row in rows() if row.summary.outcome is outcome)


def test_every_trial_has_a_file_of_its_own_under_the_name_of_its_step_file(folder: Path) -> None:
    names = {path.parent.name for path in folder.glob(f"*/{FILE}")}

    assert names == {*NAMES, "verdict"}


def test_a_curve_holds_every_step_and_skips_what_was_not_finite(folder: Path) -> None:
    row = trial(Outcome.PRUNED)
    records = steps_of(row)

    found = scalars_in(folder / row.trial_id / FILE)

    assert [step for step, _ in found["train/is_bad"]] == [one.step for one in records]
    assert sum(value for _, value in found["train/is_bad"]) == row.summary.num_bad_steps
    assert [step for step, _ in found["train/loss"]] == [
        one.step for one in records if one.loss is not None
    ]
    assert found["train/loss_scale"][0] == (1, records[0].scale)
    assert found["trial/num_bad_steps"] == [(row.summary.num_steps, row.summary.num_bad_steps)]
    assert found["trial/q"] == [(row.summary.num_steps, 0.75)]


def test_settings_have_their_type_and_their_domain(folder: Path) -> None:
    infos = {info.name: info for info in experiment_in(folder).hparam_infos}

    assert list(infos) == [
        "learning_rate",
        "precision",
        "init_scale",
        "clip_norm",
        "attention_clamp",
        "attention_logit_cap",
    ]
    rate = infos["learning_rate"].domain_interval
    assert (rate.min_value, rate.max_value) == (1e-4, 0.3)
    scales = infos["init_scale"].domain_discrete.values
    assert [value.number_value for value in scales] == [1024, 65536, 16777216]
    clips = infos["clip_norm"].domain_discrete.values
    assert [value.string_value for value in clips] == ["null", "0.5", "1.0", "5.0", "10.0"]


def test_only_search_trials_are_sessions_and_each_says_how_it_ended(folder: Path) -> None:
    sessions = {name: found for name in NAMES if (found := hparams_in(folder / name / FILE))}

    assert tuple(sessions) == SEARCHED
    for row in rows():
        if row.stage is Stage.SEARCH:
            end = sessions[file_name(row)]["_hparams_/session_end_info"].session_end_info
            is_good = row.summary.outcome is Outcome.COMPLETED
            assert end.status == (1 if is_good else 2), row.summary.outcome


def test_a_session_has_the_settings_that_vary_without_an_inactive_one(folder: Path) -> None:
    row = trial(Outcome.DIVERGED)  # bf16: no loss scale

    start = hparams_in(folder / row.trial_id / FILE)["_hparams_/session_start_info"]
    given = start.session_start_info.hparams

    assert "init_scale" not in given
    assert given["learning_rate"].number_value == row.settings["learning_rate"]
    assert given["precision"].string_value == "bf16"
    assert given["attention_clamp"].string_value == "null"  # off, and a choice


def test_the_values_of_sessions_lie_in_the_domains(folder: Path) -> None:
    """TensorBoard filters by the domain: a value spelled otherwise would never be listed."""
    domains = {
        info.name: {value.string_value for value in info.domain_discrete.values}
        for info in experiment_in(folder).hparam_infos
    }
    for name in SEARCHED:
        start = hparams_in(folder / name / FILE)["_hparams_/session_start_info"]
        for setting, value in start.session_start_info.hparams.items():
            if value.WhichOneof("kind") == "string_value":
                assert value.string_value in domains[setting]


def test_the_verdict_is_there_to_read(folder: Path) -> None:
    (_, event) = events_in(folder / "verdict" / FILE)
    said = event.summary.value[0].tensor.string_val[0].decode()

    assert "choice: c0ffee" in said
    assert "margin: 2" in said
    assert f"score: {number(71.5)}" in said
    assert "clip_norm: null" in said


def test_writing_a_trial_again_changes_nothing_and_it_is_known_the_next_time(
    folder: Path,
) -> None:
    before = {path: path.read_bytes() for path in folder.glob(f"*/{FILE}")}
    tracker, files = TensorBoardTracker(), RunFiles(folder.parent)

    known = tracker.begin(files.study("0" * 32))
    for row in rows():
        tracker.add_trial(files.trial(file_name(row), q_of(row)))

    assert set(NAMES) <= known
    assert {path: path.read_bytes() for path in folder.glob(f"*/{FILE}")} == before


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_itself_lists_the_trials_with_settings_and_metrics(folder: Path) -> None:
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = RequestContext()
    metadata = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(
        request, "", True, metadata, backend.hparams_from_data_provider(request, "", 100)
    )
    asked = api_pb2.ListSessionGroupsRequest(
        slice_size=100,
        start_index=0,
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE],
        aggregation_type=api_pb2.AGGREGATION_AVG,
    )

    listed = list_session_groups.Handler(request, backend, "", asked).run()

    assert {info.name for info in experiment.hparam_infos} >= {"learning_rate", "clip_norm"}
    assert {group.name for group in listed.session_groups} == set(SEARCHED)
    row = trial(Outcome.PRUNED)
    (group,) = [group for group in listed.session_groups if group.name == row.trial_id]
    metrics = {value.name.tag: value.value for value in group.metric_values}
    assert metrics["trial/q"] == 0.75
    assert metrics["trial/num_bad_steps"] == row.summary.num_bad_steps
    assert group.hparams["clip_norm"].string_value == str(row.settings["clip_norm"])
