"""`train`: a chosen configuration trained for long, with the guards that it was found under."""
