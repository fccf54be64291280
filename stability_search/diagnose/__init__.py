"""`diagnose`: what breaks a training that fails, found by leaving one thing out at a time.

`diagnose` climbs the ladder of a space's configuration of today and writes the verdict down;
`overfit_test` sees whether a handful of samples is learned by heart. What they decide, and in
which order, is explained in this folder's README.
"""

from stability_search.diagnose.session import Finished, diagnose, overfit_test
from stability_search.diagnose.verdict import Cause

__all__ = ["Cause", "Finished", "diagnose", "overfit_test"]
