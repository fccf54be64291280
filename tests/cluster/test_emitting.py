"""`submit --emit`: what is printed where, and that no name can get out of its place in it."""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stability_search.cli import cluster_commands, main

TASK = "class Mine:\n    def __init__(self, width: int = 4) -> None: ...\n"
SPACE = """\
name: small
task: {task}
space:
  learning_rate: {{loguniform: {{low: 1e-3, high: 0.1}}}}
"""
HOSTILE = 'it\'s $(touch pwned) `id`;"x" & é'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the present folder: it has a hostile name, and no cluster can be asked from it."""
    here = tmp_path / HOSTILE
    here.mkdir()
    (here / "mine.py").write_text(TASK)
    (here / "small.yaml").write_text(SPACE.format(task="./mine.py:Mine"))
    monkeypatch.chdir(here)

    def connect(_address: object) -> None:
        raise AssertionError("nothing may be asked")

    monkeypatch.setattr(cluster_commands, "connect", connect)
    return here


def emit(
    capfd: pytest.CaptureFixture[str], *words: str, space: str = "small.yaml"
) -> tuple[int, str, str]:
    code = main(["submit", "--space", space, *words])
    out, err = capfd.readouterr()
    return code, out, err


def documents(text: str) -> dict[str, Any]:
    return {one["kind"]: one for one in yaml.load_all(text, Loader=yaml.CSafeLoader)}


def variables_of(script: str, folder: Path) -> list[str]:
    """Let Bash itself say what the lines at the top of a script mean."""
    top = script[script.index("set -euo") :].partition("\n\n")[2].partition("\n\n")[0]
    code = f'{top}\nprintf "%s\\0" "$space" "$run_directory" "${{overrides[@]}}"'
    done = subprocess.run(  # noqa: S603 - the lines are what is tested
        ["/bin/bash", "-uc", code], cwd=folder, capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


@pytest.mark.usefixtures("folder")
def test_a_manifest_goes_to_standard_output_and_what_to_do_next_to_the_other(
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = ("--image", "registry.example/ray:1", "--nodes", "3", "--gpus-per-node", "4")
    code, out, err = emit(capfd, "--emit", "kuberay", *words, "--set", "trial.steps=40")

    assert code == 0
    job, inputs = documents(out)["RayJob"], documents(out)["ConfigMap"]
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    (container,) = workers["template"]["spec"]["containers"]
    assert workers["replicas"] == 3
    assert container["image"] == "registry.example/ray:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "activeDeadlineSeconds" not in job["spec"]
    assert [*inputs["data"].values()][1:] == [
        SPACE.format(task="./mine.py:Mine") + "trial: {steps: 40}\n",
        TASK,
    ]
    assert job["metadata"]["annotations"]["stability-search/study"].startswith("small-")
    assert err.splitlines() == [
        "space file: small.yaml",
        "next: keep standard output as FILE, read it, then `kubectl apply -f FILE`",
    ]


def test_a_manifest_has_the_package_without_its_secrets_whatever_its_files_are_called(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    contents = {
        "tasks.py": TASK.encode(),
        f"{HOSTILE}.txt": b"text\n---\nkind: Pod\n",
        "a\n  b: c.bin": b"\xff\0",
        ".env": b"canary",
    }
    (folder / "pack").mkdir()
    for name, content in contents.items():
        (folder / "pack" / name).write_bytes(content)
    (folder / "packed.yaml").write_text(SPACE.format(task="pack.tasks:Mine"))

    code, out, err = emit(
        capfd, "--emit", "kuberay", "--image", "r/i:1", "--name", "mine", space="packed.yaml"
    )

    assert code == 0
    assert documents(out).keys() == {"ConfigMap", "PersistentVolumeClaim", "RayJob"}
    found = documents(out)
    pod = found["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (items,) = (one["configMap"]["items"] for one in pod["volumes"] if one["name"] == "input")
    texts, binaries = found["ConfigMap"]["data"], found["ConfigMap"]["binaryData"]
    read = {
        one["path"].removeprefix("files/pack/"): texts[one["key"]].encode()
        if one["key"] in texts
        else base64.b64decode(binaries[one["key"]])
        for one in items
        if one["path"].startswith("files/pack/")
    }
    assert read == {name: content for name, content in contents.items() if name != ".env"}
    assert "canary" not in out
    assert "note: not sent, as names of passwords and keys: pack/.env." in err
    assert found["RayJob"]["metadata"]["name"] == "mine"


def test_a_script_for_slurm_names_files_where_they_are_and_shellcheck_has_nothing_to_say(
    folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    change = f"task_args.width={HOSTILE}"
    words = ("--cpus-per-node", "6", "--time-limit-s", "3600", "--set", change)
    code, out, err = emit(capfd, "--emit", "slurm", *words)

    assert code == 0
    space, output, *overrides = variables_of(out, tmp_path)
    assert space == str(folder / "small.yaml")
    assert Path(output).parent == folder / "reports"
    assert Path(output).name.startswith("small-")
    assert overrides == ["--set", change]
    assert "#SBATCH --cpus-per-task=6\n" in out
    assert "#SBATCH --time=0-01:00:00\n" in out
    assert (
        err.splitlines()[-1] == "next: keep standard output as FILE, read it, then `sbatch FILE`"
    )
    assert not (tmp_path / "pwned").exists()
    script = tmp_path / "study.sh"
    script.write_text(out)
    checked = subprocess.run(  # noqa: S603 - it comes with the `dev` extra
        [Path(sys.executable).with_name("shellcheck"), script], capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout) == (0, b"")


@pytest.mark.usefixtures("folder")
def test_another_study_of_the_same_name_has_another_directory(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def output(*words: str) -> str:
        return variables_of(emit(capfd, "--emit", "slurm", *words)[1], tmp_path)[1]

    assert output("--set", "search.trials=99") == output()
    assert output("--set", "seed=1") != output()
    assert output("--name", "mine").endswith("/reports/mine")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--address, --emit: one of them is needed, but got none"),
        (("--emit", "kuberay"), "--emit kuberay: an image must be named"),
        (("--emit", "kuberay", "--image", "a b"), "--image: a container image must be named"),
        (("--emit", "slurm", "--image", "a"), "--image: taken with --emit kuberay only"),
        (("--emit", "slurm", "--nodes", "0"), "--nodes: at least 1 is needed, but got 0"),
        (("--emit", "slurm", "--cpus-per-node", "0"), "--cpus-per-node: at least 1 is needed"),
        (("--emit", "slurm", "--gpus-per-node", "-1"), "--gpus-per-node: at least 0 is needed"),
        (("--emit", "slurm", "--time-limit-s", "0"), "--time-limit-s: at least 1 is needed"),
        (("--emit", "slurm", "--time-limit-s", "1"), "--time-limit-s: at least 300 is needed"),
        (("--emit", "slurm", "--name", "../x"), "--name: letters, digits"),
        (
            ("--emit", "slurm", "--address", "http://localhost:1"),
            "--address: not taken with --emit, which sends nothing.",
        ),
        (("--address", "http://localhost:1", "--nodes", "2"), "--nodes: taken with --emit only"),
        (("--emit", "pbs"), "'pbs' is not one of"),
        (
            ("--image", "i", "--nodes", "2"),
            "one of them is needed, but got none. --image, --nodes: taken with --emit only.",
        ),
        (
            (
                *("--emit", "slurm", "--image", "i", "--no-wait", "--dry-run", "--insecure"),
                *("--remote-output", "/r", "--python", "p", "--max-upload-mib", "1"),
            ),
            "--max-upload-mib: not taken with --emit, which sends nothing. --image: taken with",
        ),
    ],
)
def test_what_cannot_be_honoured_is_one_line_and_prints_nothing(
    words: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    code, out, err = emit(capfd, *words)

    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.usefixtures("folder")
def test_all_that_cannot_be_honoured_is_named_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--no-wait", "--dry-run", "--insecure", "--remote-output", "--python"]
    words = [w for name in options for w in ([name, "x"] if options.index(name) > 2 else [name])]
    _, _, err = emit(capfd, "--emit", "kuberay", *words, "--max-upload-mib", "50")
    assert err.startswith(f"{', '.join(options)}, --max-upload-mib: not taken with --emit, ")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_an_address_in_the_environment_is_not_taken_and_said_to_be_not(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "http://me:canary@h:8265")
    code, _, err = emit(capfd)
    assert code == 2
    assert f"http://localhost:8265. {name} is not read: where things go is said each time." in err
    assert "canary" not in err
