"""The guards inside a training script that nobody edited; every patch can be taken back."""
