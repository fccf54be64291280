"""The manifest for Kubernetes: what KubeRay wants of it, and what names cannot do to it."""

import base64
import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stability_search.cluster.emit_plan import EmitPlan, InputFile
from stability_search.cluster.kuberay import MAX_INPUT_BYTES, quoted, render_rayjob
from stability_search.errors import UsageError
from tests.hostile_strings import HOSTILE_STRINGS

SPACE = b"task: ./task.py:Task\nspace:\n  learning_rate: {uniform: {low: 1e-3, high: 1}}\n"
PLAN = EmitPlan(
    study="teacher",
    folder="/not/used",
    space="teacher.yaml",
    output="/not/used",
    version="0.1.0",
    ray_version="2.60.0",
    image="registry.example/stability-search:0.1.0",
    files=(
        InputFile(path="teacher.yaml", content=SPACE),
        InputFile(path="package/task.py", content=b"class Task:\n\tpass\n"),
    ),
)

# Which fields a RayJob must have: KubeRay's API reference and its `rayStartParams` page, and the
# checks of its operator (`ValidateRayJobSpec`, `ValidateRayClusterSpec`), versions 1.5.1 to 1.7.0.
# A manifest made here was also held against the schemas of these versions by hand.
REQUIRED = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata.name": "teacher",
    "spec.entrypoint": "bash /stability-search/input/start.sh",
    "spec.rayClusterSpec.rayVersion": "2.60.0",  # wanted where authentication is on
    "spec.rayClusterSpec.headGroupSpec.rayStartParams": {"num-cpus": "0"},
    "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.name": "ray-head",
    "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.image": PLAN.image,
    "spec.rayClusterSpec.workerGroupSpecs.0.groupName": "trials",
    "spec.rayClusterSpec.workerGroupSpecs.0.replicas": 1,
    "spec.rayClusterSpec.workerGroupSpecs.0.minReplicas": 1,  # wanted where nothing scales
    "spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas": 1,
    "spec.rayClusterSpec.workerGroupSpecs.0.rayStartParams": {},
    "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.name": "ray-worker",
    "spec.rayClusterSpec.workerGroupSpecs.0.template.spec.containers.0.image": PLAN.image,
}
# What a study needs of it beyond that.
WANTED = {
    "spec.submissionMode": "HTTPMode",  # no pod that submits, and so none that is tried again
    "spec.backoffLimit": 0,
    "spec.shutdownAfterJobFinishes": True,
    "spec.ttlSecondsAfterFinished": 600,  # positive only where the cluster is shut down
    "spec.rayClusterSpec.authOptions": {"mode": "token"},
}


POSSIBLE = [text for text in HOSTILE_STRINGS if not re.search("[\0\ud800-\udfff]", text)]


def read(text: str) -> dict[str, Any]:
    """Return the documents by kind, read by YAML 1.1, as Kubernetes does."""
    documents = list(yaml.load_all(text, Loader=yaml.CSafeLoader))
    kinds = [document["kind"] for document in documents]
    assert kinds == ["ConfigMap", "PersistentVolumeClaim", "RayJob"]
    return dict(zip(kinds, documents, strict=True))


def at(document: Any, path: str) -> Any:  # noqa: ANN401 - any part of it
    for name in path.split("."):
        document = document[int(name)] if name.isdigit() else document[name]
    return document


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return read(render_rayjob(PLAN))


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["RayJob"]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def files_in(manifest: dict[str, Any], pod: dict[str, Any]) -> dict[str, bytes]:
    """Return what a pod sees in its input folder."""
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "input")
    assert volume["configMap"]["name"] == manifest["ConfigMap"]["metadata"]["name"]
    data = {key: text.encode() for key, text in manifest["ConfigMap"]["data"].items()}
    for key, text in manifest["ConfigMap"].get("binaryData", {}).items():
        data[key] = base64.b64decode(text)
    return {item["path"]: data[item["key"]] for item in volume["configMap"]["items"]}


def test_both_versions_of_yaml_read_the_same(plain: dict[str, Any]) -> None:
    documents = YAML(typ="safe", pure=True).load_all(io.StringIO(render_rayjob(PLAN)))
    assert list(documents) == list(plain.values())


def test_it_has_every_field_that_kuberay_requires(plain: dict[str, Any]) -> None:
    found = {path: at(plain["RayJob"], path) for path in REQUIRED}
    assert found == REQUIRED


def test_it_tries_nothing_again_and_leaves_nothing_running(plain: dict[str, Any]) -> None:
    found = {path: at(plain["RayJob"], path) for path in WANTED}
    assert found == WANTED
    assert "submitterConfig" not in plain["RayJob"]["spec"]
    assert "activeDeadlineSeconds" not in plain["RayJob"]["spec"]


def test_no_pod_has_rights_that_a_trial_does_not_need(plain: dict[str, Any]) -> None:
    for pod in pods(plain):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


def test_no_token_stands_in_it() -> None:
    text = render_rayjob(PLAN)
    assert "RAY_AUTH_TOKEN=" not in text
    assert not [line for line in text.splitlines() if "env:" in line or "auth_token" in line]


def test_the_run_directory_is_on_a_claim_that_the_head_alone_mounts(
    plain: dict[str, Any],
) -> None:
    claim = plain["PersistentVolumeClaim"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "10Gi"
    head, worker = pods(plain)
    (volume,) = (volume for volume in head["volumes"] if volume["name"] == "results")
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}
    assert mounts["results"] == "/stability-search/results"
    assert [volume["name"] for volume in worker["volumes"]] == ["input"]


def test_a_worker_has_what_the_plan_says_and_the_head_no_gpu() -> None:
    plan = dataclasses.replace(
        PLAN, nodes=12, cpus_per_node=32, gpus_per_node=8, memory_gib_per_node=256
    )
    manifest = read(render_rayjob(dataclasses.replace(plan, time_limit_s=7200)))
    head, worker = (pod["containers"][0]["resources"] for pod in pods(manifest))
    amounts = {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": 8}
    assert worker == {"requests": amounts, "limits": amounts}
    assert "nvidia.com/gpu" not in head["limits"]
    (group,) = manifest["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [12] * 3
    assert manifest["RayJob"]["spec"]["activeDeadlineSeconds"] == 7200


def test_every_pod_sees_the_files_of_the_study(plain: dict[str, Any]) -> None:
    for pod in pods(plain):
        seen = files_in(plain, pod)
        assert seen.pop("start.sh").startswith(b"set -euo pipefail\n")
        assert seen == {f"files/{file.path}": file.content for file in PLAN.files}


START = f"""\
#!{sys.executable}
import os, sys
from pathlib import Path

Path(os.environ["RECORD"]).write_bytes(b"".join(os.fsencode(w) + b"\\0" for w in sys.argv[1:]))
"""


def test_the_same_manifest_begins_a_study_and_then_goes_on_with_it(tmp_path: Path) -> None:
    overrides = tuple(POSSIBLE)
    space = "it's a `touch planted` $(touch planted).yaml"
    files = (InputFile(path=space, content=SPACE), InputFile(path="start.sh", content=b"mine"))
    plan = dataclasses.replace(PLAN, space=space, files=files, overrides=overrides)
    manifest = read(render_rayjob(plan))
    seen = files_in(manifest, pods(manifest)[0])
    assert seen["files/start.sh"] == b"mine"
    for path, content in seen.items():
        file = tmp_path / "input" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    start = tmp_path / "input" / "start.sh"
    start.write_bytes(start.read_bytes().replace(b"/stability-search", bytes(tmp_path)))
    program = tmp_path / "bin" / "stability-search"
    program.parent.mkdir()
    program.write_text(START)
    program.chmod(0o755)

    def words() -> list[str]:
        environment = {
            "PATH": f"{program.parent}:/usr/bin:/bin",
            "RECORD": str(tmp_path / "words"),
        }
        subprocess.run(["/bin/bash", str(start)], env=environment, check=True)  # noqa: S603
        return (tmp_path / "words").read_bytes().decode().split("\0")[:-1]

    directory = tmp_path / "results" / "teacher"
    ends = ["--output", str(directory), "--address", "auto"]
    sets = [word for override in overrides for word in ("--set", override)]
    assert words() == ["run", "--space", space, *sets, *ends]
    directory.mkdir(parents=True)
    (directory / "space.yaml").touch()
    assert words() == ["resume", str(directory), "--address", "auto"]
    assert not list(tmp_path.rglob("planted*"))
    checked = subprocess.run(  # noqa: S603 - it comes with the `dev` extra
        [
            str(Path(sys.executable).with_name("shellcheck")),
            *("--norc", "--shell=bash", "--exclude=SC1003,SC2016", str(start)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout) == (0, "")


@pytest.mark.parametrize("name", ["null", "yes", "true", "on", "y", "off"])
def test_a_name_that_yaml_takes_for_a_value_stays_a_name(name: str) -> None:
    manifest = read(render_rayjob(dataclasses.replace(PLAN, study=name)))
    assert manifest["RayJob"]["metadata"]["name"] == name


def test_a_hostile_name_changes_nothing_but_itself(plain: dict[str, Any]) -> None:
    name = "teacher".join(POSSIBLE)
    job = read(render_rayjob(dataclasses.replace(PLAN, study=name)))["RayJob"]
    metadata = job["metadata"]
    assert metadata["annotations"]["stability-search/study"] == name
    job["metadata"] = plain["RayJob"]["metadata"]
    assert str(job).replace(f"{metadata['name']}-", "teacher-") == str(plain["RayJob"])


@given(st.text())
def test_a_quoted_text_is_read_back_as_it_is(text: str) -> None:
    assert yaml.load(quoted(text), Loader=yaml.CSafeLoader) == text


AWKWARD = st.text(alphabet="a \t\n\r#:-'\"|>%@\x7f\x85\u2028\ufeffü\U0001f600", max_size=12)


@settings(max_examples=25)
@given(st.lists(AWKWARD, min_size=1, max_size=20))
def test_files_arrive_byte_for_byte(texts: list[str]) -> None:
    files = [InputFile(path=f"{i}", content=text.encode()) for i, text in enumerate(texts)]
    rendered = render_rayjob(dataclasses.replace(PLAN, files=(*PLAN.files, *files)))
    data = next(iter(yaml.load_all(rendered, Loader=yaml.CSafeLoader)))["data"]
    assert [data[f"{i + 3}-files_{i}"] for i in range(len(texts))] == texts


def test_a_file_that_is_no_text_arrives_too() -> None:
    files = (*PLAN.files, InputFile(path="x", content=b"\xff\0"))
    manifest = read(render_rayjob(dataclasses.replace(PLAN, files=files)))
    assert files_in(manifest, pods(manifest)[1])["files/x"] == b"\xff\0"
    assert "3-files_x" not in manifest["ConfigMap"]["data"]


def test_what_a_config_map_cannot_hold_is_refused() -> None:
    large = InputFile(path="data.bin", content=bytes(MAX_INPUT_BYTES))
    with pytest.raises(UsageError, match=r"may have 1,000,000 bytes together, but have 1,000,"):
        render_rayjob(dataclasses.replace(PLAN, files=(*PLAN.files, large)))


def test_an_image_and_the_space_file_are_needed() -> None:
    with pytest.raises(UsageError, match="an image must be named"):
        render_rayjob(dataclasses.replace(PLAN, image=""))
    with pytest.raises(UsageError, match="the space file must be among the files"):
        render_rayjob(dataclasses.replace(PLAN, space="other.yaml"))


def test_no_comment_ends_where_a_name_wants_it_to() -> None:
    text = render_rayjob(dataclasses.replace(PLAN, study="\nkind: Secret\n---\n"))
    head, _, _ = text.partition("apiVersion: v1\n")
    assert all(line.startswith("#") for line in head.splitlines())
