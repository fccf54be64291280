"""A study as a batch script for Slurm, which starts a Ray of its own on the nodes it is given.

Every value stands in one line at the top, quoted; the rest of the script is the same for all.
`ray symmetric-run` ends with 0 where Ray could not be started, and with whatever a node that lost
its head ends with. So the script believes neither: the study's own exit code is written to a file.
"""

import shlex

from stability_search.cluster.emit_plan import EmitPlan
from stability_search.errors import UsageError

_LEAST_TIME_S = 300  # Ray starts, the study begins, and is warned two minutes before the end
_BODY = """\
for program in ray srun stability-search; do
  command -v "$program" >/dev/null || {
    echo "$program: not found on $(hostname); activate its environment before sbatch" >&2
    exit 2
  }
done

# Whoever may speak to this Ray may run code on its nodes: it asks for a token, made here, that
# stands in no file and in no argument.
RAY_AUTH_TOKEN=$(od -A n -t x1 -N 32 /dev/urandom | tr -d ' \\n')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300  # seconds; 30 are few on a busy file system
export RAY_gcs_rpc_server_reconnect_timeout_s=20   # nodes leave so soon after the head has ended

# This script runs on the first node, which becomes Ray's head. Other nodes reach it by the first
# address it has; put another one here if they do not. Ray listens on all of them: see the token.
address=127.0.0.1
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  address=$(hostname --all-ip-addresses)
  address=${address%% *}
fi
export STUDY_ADDRESS="$address:$((20000 + SLURM_JOB_ID % 10000))"

cd "${called_from:-.}" # what a task imports may lie there

if [ -f "$run_directory/space.yaml" ]; then
  set -- resume "$run_directory"
else
  set -- run --space "$space" "${overrides[@]}" --output "$run_directory"
fi

state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT

# On the head: the study, its process id before it starts, and its exit code.
study() {
  local code=0 state=$1
  shift
  (
    echo "$BASHPID" >"$state/pid"
    exec stability-search "$@" --address "$STUDY_ADDRESS"
  ) || code=$?
  echo "$code" >"$state/exit-code"
  return "$code"
}

# On each node: Ray. The head keeps a core for the study itself, and has no dashboard, so that
# nobody can submit a job to it.
node() {
  local cpus=$SLURM_CPUS_PER_TASK head_only=()
  if [ "$SLURM_NODEID" -eq 0 ]; then
    head_only=(--include-dashboard=false)
    [ "$cpus" -eq 1 ] || cpus=$((cpus - 1))
  fi
  exec ray symmetric-run --address "$STUDY_ADDRESS" --min-nodes "$SLURM_JOB_NUM_NODES" \\
    --num-cpus="$cpus" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" "${head_only[@]}" \\
    -- bash -c "$(declare -f study); study \\"\\$@\\"" study "$@"
}

# Slurm signals this script before the time is up. The study keeps its state and ends by itself.
stop() {
  if [ -s "$state/pid" ]; then
    kill -TERM "$(<"$state/pid")" || true
  else
    kill -TERM "$step" || true
  fi
}

# A node that is lost is no end: its trials run elsewhere.
srun --export=ALL --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=none \\
  --no-kill --kill-on-bad-exit=0 --wait=0 \\
  bash -c "$(declare -f study node); node \\"\\$@\\"" node "$state" "$@" &
step=$!
trap stop TERM
while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
  wait "$step" || true
done

if [ ! -s "$state/exit-code" ]; then
  if [ -s "$state/pid" ]; then
    echo "the study was killed; submitted again, this script goes on where it stopped" >&2
  else
    echo "the study did not run: Ray did not start on $SLURM_JOB_NUM_NODES nodes, see above" >&2
  fi
  exit 4
fi
code=$(<"$state/exit-code")
case $code in
  0 | 3) ;; # a verdict, good or bad
  *) echo "exit code $code; submitted again, this script goes on where the study stopped" >&2 ;;
esac
exit "$code"
"""


def render_sbatch(plan: EmitPlan) -> str:
    """Write the batch script: `sbatch` begins the study, and goes on with it when it is there.

    Args:
        plan: The study; `image`, `storage_gib`, `files` and memory are not used. Its folder and
            its run directory must be on a file system that whichever node comes first sees.

    Returns:
        A Bash script. Its exit code is the study's, or 4 if Ray did not start.

    Raises:
        UsageError: The time limit is too short for the warning before it.
    """
    limit_s = plan.time_limit_s
    if limit_s is not None and limit_s < _LEAST_TIME_S:
        raise UsageError(
            f"--time-limit-s: at least {_LEAST_TIME_S} is needed for slurm, but got {limit_s}: "
            "the study is warned two minutes before the end."
        )
    overrides = [word for override in plan.overrides for word in ("--set", override)]
    lines = [
        "#!/bin/bash",
        f"# The study {plan.label} on Slurm; written by stability-search {plan.version} for Ray",
        f"# {plan.ray_version}. Activate the environment that holds both, then",
        "#",
        "#     sbatch THIS_FILE              begins it; once more, goes on where it stopped",
        "#     sbatch --nodes=4 THIS_FILE    what is said there goes before the lines below",
        "#",
        "# Every node must see that environment and the data that the task reads. The first one",
        "# reads the space file and writes the run directory. Exit codes are those of `run`.",
        f"#SBATCH --job-name={plan.label}",
        f"#SBATCH --nodes={plan.nodes}",
        "#SBATCH --ntasks-per-node=1",
        f"#SBATCH --cpus-per-task={plan.cpus_per_node}",
    ]
    if plan.gpus_per_node:
        lines.append(f"#SBATCH --gpus-per-node={plan.gpus_per_node}")
    if limit_s is not None:
        lines.append(f"#SBATCH --time={_slurm_time(limit_s)}")
    lines += [
        "# Whole nodes: `ray stop` ends every Ray of yours on a node, and Ray wants a node alone.",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "#SBATCH --no-kill",
        "#SBATCH --signal=B:TERM@120",
        "",
        "# shellcheck disable=SC1003,SC2016,SC2329 # odd names; functions that the nodes call",
        "set -euo pipefail",
        "",
        f"called_from={shlex.quote(plan.called_from)}",
        f"space={shlex.quote(_joined(plan.folder, plan.space))}",
        f"run_directory={shlex.quote(plan.output)}",
        f"overrides=({shlex.join(overrides)})",
        "",
    ]
    return "\n".join(lines) + "\n" + _BODY


def _joined(folder: str, path: str) -> str:
    return f"{folder.rstrip('/')}/{path}"


def _slurm_time(seconds: int) -> str:
    """Return days-hours:minutes:seconds."""
    days, rest = divmod(seconds, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    return f"{days}-{hours:02}:{minutes:02}:{left:02}"
