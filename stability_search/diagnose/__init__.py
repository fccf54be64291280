"""`diagnose`: what breaks a training that fails, found by leaving one thing out at a time."""
