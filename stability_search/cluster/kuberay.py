"""A study as a manifest for Kubernetes with KubeRay: its files, a volume, and a RayJob.

The manifest is a text to be read, and changed, before it is applied. Whatever comes from outside
enters it as a quoted scalar, as a number, or as a block of lines below a key.
"""

import base64
import json
import re
import shlex
from collections.abc import Sequence
from textwrap import indent

from stability_search.cluster.emit_plan import EmitPlan, InputFile
from stability_search.errors import UsageError

MAX_INPUT_BYTES = 1_000_000  # Kubernetes takes 1 MiB of a ConfigMap; its keys count too

_TTL_S = 600  # the pods stay so long after the end
_USER = 1000  # that of Ray's own images
_INPUT = "/stability-search/input"
_RESULTS = "/stability-search/results"
_NOT_IN_KEY = re.compile(r"[^-._a-zA-Z0-9]")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
_KEY_LENGTH = 200  # Kubernetes takes 253
# What may stand in a block of lines as it is: YAML 1.1 and 1.2 agree on this much.
_LINES = re.compile(
    r"[\t\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]+"
)

_START = """\
set -euo pipefail
cd {input}/files
run_directory={results}/{label}
if [ -f "$run_directory/space.yaml" ]; then
  exec stability-search resume "$run_directory" --address auto
fi
exec stability-search run {words} --output "$run_directory" --address auto
"""

_MANIFEST = """\
# The study {label} on Kubernetes with KubeRay 1.5.1 or newer; written by stability-search
# {version}. The image must hold it and Ray {ray_version}, and run as user {user}.
#
#   kubectl apply -f THIS_FILE           begin
#   kubectl get rayjob {label}
#   kubectl delete rayjob {label}        and apply again: go on where the study stopped
#
# Every exit code but 0 is shown as `FAILED`, 3 (no stable configuration) too. The pods are
# deleted {ttl} s after the end, and what they wrote with them; the run directory stays, as the
# folder {label} of the claim {label}-results. `kubectl delete -f THIS_FILE` would delete
# it as well. To take it home, start a pod that sees it, copy, and delete that pod:
#
#   {reader}
#   kubectl cp {label}-reader:/results/{label} {label}
#
# Ray runs any code for whoever holds its token. KubeRay makes one and keeps it in a Secret of
# this namespace: it stands nowhere here, and whoever may read Secrets there may use it.
apiVersion: v1
kind: ConfigMap
metadata:
  name: {label}-input
{inputs}---
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {label}-results
spec:
  accessModes: [ReadWriteOnce]  # the head alone writes: workers send it what they found
  resources:
    requests:
      storage: {storage}Gi
---
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: "{label}"
  annotations:
    stability-search/study: {study}
    stability-search/version: {version_text}
spec:
  entrypoint: bash {input}/start.sh
  submissionMode: HTTPMode  # the operator submits and asks: no pod whose lost log ends the study
  backoffLimit: 0  # no second cluster on its own: the study goes on when applied again
{deadline}  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: {ttl}
  rayClusterSpec:
    rayVersion: {ray_version_text}
    authOptions:
      mode: token  # RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN from KubeRay's Secret, in every pod
    headGroupSpec:
      rayStartParams:
        num-cpus: "0"  # the head runs the study, not its trials
      template:
{head}    workerGroupSpecs:
      - groupName: trials
        replicas: {nodes}
        minReplicas: {nodes}
        maxReplicas: {nodes}
        rayStartParams: {{}}
        template:
{worker}"""

_POD = """\
spec:
  automountServiceAccountToken: false  # trials run your code, which needs no Kubernetes
  securityContext:
    runAsNonRoot: true
    runAsUser: {user}
    fsGroup: {user}
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: ray-{role}
      image: {image}
      securityContext:
        allowPrivilegeEscalation: false
        capabilities:
          drop: [ALL]
      resources:
        requests: {amounts}
        limits: {amounts}
{ports}      volumeMounts:
        - name: input
          mountPath: {input}
          readOnly: true
{mounts}  volumes:
    - name: input
      configMap:
        name: {label}-input
        items:
{items}{volumes}"""

_HEAD_PORTS = """\
      ports:
        - containerPort: 6379
          name: gcs-server
        - containerPort: 8265
          name: dashboard
"""
_HEAD_MOUNTS = f"""\
        - name: results
          mountPath: {_RESULTS}
"""
_HEAD_VOLUMES = """\
    - name: results
      persistentVolumeClaim:
        claimName: {label}-results
"""


def render_rayjob(plan: EmitPlan) -> str:
    """Write the manifest: a ConfigMap, a claim for the results and a RayJob, ready to apply.

    Args:
        plan: The study; `folder` and `output` are not used. `files` holds the space file and
            what its task imports.

    Returns:
        YAML text of three documents, ASCII but for the study's own files. It holds no token.

    Raises:
        UsageError: There is no image or no space file among `files`, or the files are too large.
    """
    if not plan.image:
        raise UsageError(
            "--emit kuberay: an image must be named, but got none.",
            hint="Name one that holds stability-search and Ray with --image.",
        )
    if plan.space not in {file.path for file in plan.files}:
        raise UsageError(f"{plan.space}: the space file must be among the files of the study.")
    keyed = _keyed(plan)
    return _MANIFEST.format(
        label=plan.label,
        version=plan.version,
        version_text=quoted(plan.version),
        ray_version=plan.ray_version,
        ray_version_text=quoted(plan.ray_version),
        user=_USER,
        ttl=_TTL_S,
        input=_INPUT,
        study=quoted(plan.study),
        storage=plan.storage_gib,
        nodes=plan.nodes,
        reader=_reader(plan),
        inputs=_inputs(keyed),
        deadline=(
            "" if plan.time_limit_s is None else f"  activeDeadlineSeconds: {plan.time_limit_s}\n"
        ),
        head=indent(_head(plan, keyed), " " * 8),
        worker=indent(_worker(plan, keyed), " " * 10),
    )


def quoted(text: str) -> str:
    """Write a text as a YAML scalar in double quotes, in ASCII; every reader gives it back.

    Example:
        >>> print(quoted("null"))
        "null"
    """
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return character if " " <= character <= "~" else f"\\U{ord(character):08x}"


def _keyed(plan: EmitPlan) -> tuple[tuple[str, InputFile], ...]:
    """Give every file a key that a ConfigMap takes; the script that starts all comes first.

    Raises:
        UsageError: Together they are too large.
    """
    overrides = [word for override in plan.overrides for word in ("--set", override)]
    start = _START.format(
        input=_INPUT,
        results=_RESULTS,
        label=plan.label,
        words=shlex.join(["--space", plan.space, *overrides]),
    )
    files = (
        InputFile(path="start.sh", content=start.encode()),
        *(InputFile(path=f"files/{file.path}", content=file.content) for file in plan.files),
    )
    size = sum(len(file.content) for file in files)
    if size > MAX_INPUT_BYTES:
        raise UsageError(
            f"--emit kuberay: the files of a study may have {MAX_INPUT_BYTES:,} bytes together, "
            f"but have {size:,}.",
            hint="Put the large ones into the image.",
        )
    return tuple(
        (f"{index}-{_NOT_IN_KEY.sub('_', file.path)}"[:_KEY_LENGTH], file)
        for index, file in enumerate(files)
    )


def _inputs(keyed: Sequence[tuple[str, InputFile]]) -> str:
    """Return the data of the ConfigMap: text as text, the rest in base 64."""
    text, binary = ["data:"], ["binaryData:"]
    for key, file in keyed:
        try:
            text.append(f"  {quoted(key)}: {_block(file.content.decode(), ' ' * 4)}")
        except UnicodeDecodeError:
            binary.append(f"  {quoted(key)}: {base64.b64encode(file.content).decode()}")
    return "".join(f"{line}\n" for line in [*text, *(binary if len(binary) > 1 else [])])


def _block(text: str, margin: str) -> str:
    """Write a text as a block of lines where YAML allows it, else as a quoted scalar."""
    if not _LINES.fullmatch(text) or not text.strip("\n"):
        return quoted(text)
    lines = text.split("\n")
    keep = "-"
    if not lines[-1]:
        lines.pop()
        keep = "+"
    return "\n".join([f"|2{keep}", *(f"{margin}{line}" for line in lines)])


def _reader(plan: EmitPlan) -> str:
    """Return a command that starts a pod at the results, on one line and with no odd character."""
    pod = {
        "spec": {
            "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "fsGroup": _USER},
            "containers": [
                {
                    "name": "reader",
                    "image": plan.image,
                    "command": ["sleep", "3600"],
                    "volumeMounts": [{"name": "results", "mountPath": "/results"}],
                }
            ],
            "volumes": [
                {
                    "name": "results",
                    "persistentVolumeClaim": {"claimName": f"{plan.label}-results"},
                }
            ],
        }
    }
    return shlex.join(
        [
            *("kubectl", "run", f"{plan.label}-reader", f"--image={plan.image}"),
            *("--restart=Never", f"--overrides={json.dumps(pod)}"),
        ]
    )


def _head(plan: EmitPlan, keyed: Sequence[tuple[str, InputFile]]) -> str:
    return _pod(
        plan,
        keyed,
        role="head",
        amounts='{cpu: "2", memory: 8Gi}',
        ports=_HEAD_PORTS,
        mounts=_HEAD_MOUNTS,
        volumes=_HEAD_VOLUMES.format(label=plan.label),
    )


def _worker(plan: EmitPlan, keyed: Sequence[tuple[str, InputFile]]) -> str:
    gpus = f", nvidia.com/gpu: {plan.gpus_per_node}" if plan.gpus_per_node else ""
    amounts = f'{{cpu: "{plan.cpus_per_node}", memory: {plan.memory_gib_per_node}Gi{gpus}}}'
    return _pod(plan, keyed, role="worker", amounts=amounts)


def _pod(  # noqa: PLR0913 - what differs between the head and a worker
    plan: EmitPlan,
    keyed: Sequence[tuple[str, InputFile]],
    *,
    role: str,
    amounts: str,
    ports: str = "",
    mounts: str = "",
    volumes: str = "",
) -> str:
    """Return the template of one kind of pod."""
    items = "".join(
        f"          - {{key: {quoted(key)}, path: {quoted(file.path)}}}\n" for key, file in keyed
    )
    return _POD.format(
        role=role,
        user=_USER,
        image=quoted(plan.image),
        amounts=amounts,
        ports=ports,
        input=_INPUT,
        mounts=mounts,
        label=plan.label,
        items=items,
        volumes=volumes,
    )
