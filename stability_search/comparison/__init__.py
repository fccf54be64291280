"""Two runs beside each other: what was asked of them, what they found, and whether it differs.

sides         what one run left behind
obstacles     why two runs cannot be compared, and what to bear in mind where they can
differences   settings that differ
pairs         the same seeds in both, and an exact test of the difference in q
comparing     all of it
wording       as lines, rows and one JSON object
"""

from stability_search.comparison.comparing import Comparison, compare
from stability_search.comparison.wording import as_document, as_lines, as_rows

__all__ = ["Comparison", "as_document", "as_lines", "as_rows", "compare"]
