"""A study in the tools that teams look at: TensorBoard, MLflow, Weights & Biases.

tracking    the listener: queues what events mean, says what failed
feed        one queue, one thread, one process per tool
process     that process
run_files   what is read of the run directory
tensorboard, mlflow, wandb
"""

from stability_search.trackers.listening import tracking
from stability_search.trackers.names import TrackerName

__all__ = ["TrackerName", "tracking"]
