"""The space file: what is trained, which settings vary, and how hard to look.

`load` reads a YAML file once and returns an immutable `Space`, or one `SpaceError` that lists
every problem with file, line and column. Nothing that the file names is imported.

    reading         bytes and events to a tree with places, under limits
    overrides       `--set` in the tree and in the text
    grammar         keys, types and ranges, one by one (pydantic); `key_types`, `key_check`
    task_check      the task and its constructor, from the syntax tree of its file
    setting_check   `fixed`, `space`, `when`, `start_with`
    model           `Space`, `describe`
"""

from stability_search.errors import SpaceError
from stability_search.space.loading import find, load, shipped_folder
from stability_search.space.model import Space, describe
from stability_search.space.parameter import Parameter, ParameterKind
from stability_search.space.resuming import changed_values, resume_difference, study_identity
from stability_search.space.schema import json_schema
from stability_search.space.task_check import RESERVED_COLUMNS
from stability_search.space.task_file import builtin_tasks
from stability_search.space.writing import best_yaml

__all__ = [
    "RESERVED_COLUMNS",
    "Parameter",
    "ParameterKind",
    "Space",
    "SpaceError",
    "best_yaml",
    "builtin_tasks",
    "changed_values",
    "describe",
    "find",
    "json_schema",
    "load",
    "resume_difference",
    "shipped_folder",
    "study_identity",
]
