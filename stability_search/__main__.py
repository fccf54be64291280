"""`python -m stability_search` is the `stability-search` command."""

import sys

from stability_search.cli import main

if __name__ == "__main__":
    sys.exit(main())
