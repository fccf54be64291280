"""`import stability_search.instrument` puts the guards into this process: the import that acts.

It must be the first line of a training script, before the script's own imports. Every value is an
environment variable, see patches/README.md. Removing the line removes every effect.
"""

import sys

from stability_search.errors import UsageError
from stability_search.inert import inert
from stability_search.patches import install

try:
    install()
except UsageError as error:  # before anything was trained: one line each, and no traceback
    for line in str(error).splitlines():
        sys.stderr.write(f"CRITICAL {inert(line)}\n")
    sys.exit(UsageError.exit_code)
