"""How an attempt ended, as its own record says: neither a log nor Ray's word for it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

FOLDER = "stability-search"  # in Ray's log folder of the node that the driver ran on
NOT_INSTALLED = 97  # exit code of a job that found no stability-search to run
EXIT_CODES = frozenset({0, 1, 2, 3, 4, 5, 6, 130, 143})  # that `run` and `resume` may have

_STANDARD_OUTPUT = Path("/proc/self/fd/1")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptResult:
    """The record that an attempt leaves behind.

    Attributes:
        exit_code: As `run` and `resume` return it.
        lines: What they printed on standard output: the verdict.
        run_directory: Where its files are, on that node.
        problem: Why nothing was run; empty where something was.
    """

    exit_code: int
    lines: tuple[str, ...] = ()
    run_directory: str = ""
    problem: str = ""

    def to_text(self) -> str:
        """Return it as one JSON document."""
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_text(cls, text: bytes) -> Self:
        """Read what `to_text` returned.

        Raises:
            ValueError: It is something else.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            exit_code = data["exit_code"]
            if type(exit_code) is not int or exit_code not in EXIT_CODES:
                raise ValueError("none of our exit codes")
            return cls(
                exit_code=exit_code,
                lines=tuple(str(line) for line in data["lines"]),
                run_directory=str(data["run_directory"]),
                problem=str(data["problem"]),
            )
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError("no record of an attempt") from error


def record_name(job_id: str, file: str = "result.json") -> str:
    """Return where a job leaves a file for us, seen from Ray's log folder."""
    return f"{FOLDER}/{job_id}/{file}"


def own_log_folder(output: Path = _STANDARD_OUTPUT) -> Path:
    """Return the log folder of the Ray that runs this job: its own log is written there.

    Args:
        output: A link to the file that standard output is written to.

    Raises:
        ValueError: This is no job of Ray's.
    """
    log = output.readlink() if output.is_symlink() else output
    if not log.name.startswith("job-driver-"):
        raise ValueError(f"standard output must be the log of a Ray job, but is {log}")
    return log.parent
