"""How Ray Tune treats its workers: none is dropped that is of use, and none kept that is not."""

from typing import TYPE_CHECKING, Any

import ray
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from stability_search.search.trainable import WARM
from stability_search.search.tune_bridge import Bridge

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


class KeepWorkers(FIFOScheduler):
    """Keeps every worker that is idle or starting; Tune would drop most of them.

    Tune keeps one idle worker, so that between two stages the others would end and start again;
    and it gives a pending trial to any worker that becomes free, dropping the one that was
    starting for it: with trials shorter than a worker's start, a slot stays empty for good.

    Args:
        num_slots: Trials at once.
        bridge: Knows which workers are warm, and which may go.
    """

    def __init__(self, num_slots: int, bridge: Bridge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._num_to_keep = num_slots
        self._bridge = bridge

    def on_trial_add(self, tune_controller: "TuneController", trial: "Trial") -> None:
        """Let the cache of workers hold all of them, once it is known what one occupies."""
        cache = tune_controller._actor_cache  # noqa: SLF001 - Ray 2.60 offers no setting
        if self._num_to_keep:  # the first trial
            cache.increase_max(trial.placement_group_factory, self._num_to_keep)
            hear_of_every_death(tune_controller._actor_manager)  # noqa: SLF001 - as above
        self._num_to_keep = 0

    def on_trial_result(
        self,
        tune_controller: "TuneController",  # noqa: ARG002 - the base class has it
        trial: "Trial",
        result: dict[str, Any],
    ) -> str:
        """Let a trial go on, or end it once all workers are warm if it does nothing else."""
        is_over = result["kind"] == WARM and self._bridge.note_warm(trial.trial_id)
        return TrialScheduler.STOP if is_over else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: "TuneController") -> None:
        """Drop workers that may go; pending trials are started in order anyway."""
        manager: Any = tune_controller._actor_manager  # noqa: SLF001 - Ray 2.60 has no other way
        self._bridge.note_places(
            num_placed=manager.num_live_actors, num_unplaced=manager.num_pending_actors
        )
        for trial in [*tune_controller._pending_trials]:  # noqa: SLF001 - as above
            if self._bridge.is_of_no_use(trial.trial_id):
                tune_controller.stop_trial(trial)  # type: ignore[no-untyped-call]
        cache: Any = tune_controller._actor_cache  # noqa: SLF001 - as above
        actors = manager._live_actors_to_ray_actors_resources  # noqa: SLF001
        for idle in cache._cached_objects.values():  # noqa: SLF001
            if tune_controller._pending_trials:  # noqa: SLF001 - as above
                for tracked in idle:
                    self._bridge.note_work(actors[tracked][0])
            for tracked in [one for one in idle if self._bridge.may_go(actors[one][0])]:
                idle.remove(tracked)
                cache._num_cached_objects -= 1  # noqa: SLF001
                tracked.set_on_stop(None)
                tracked.set_on_error(None)
                tune_controller._remove_actor(tracked)  # noqa: SLF001
        self._bridge.tell_of_the_gone()


def hear_of_every_death(manager: Any) -> None:  # noqa: ANN401 - a private class of Ray's
    """Let Tune's manager of actors take whatever Ray says of one that is gone for its death.

    It knows Ray's usual error of a dead actor; of another, as that of the memory monitor, it
    makes an exception that ends the whole study.

    Args:
        manager: As Tune's controller has it.
    """
    take = manager._actor_task_failed  # noqa: SLF001 - Ray 2.60 offers no other way

    def take_any(tracked_actor_task: object, exception: Exception) -> None:
        known = ray.exceptions.RayActorError, ray.exceptions.RayTaskError
        if not isinstance(exception, known):
            exception = ray.exceptions.RayActorError(error_msg=str(exception))
        take(tracked_actor_task, exception)

    manager._actor_task_failed = take_any  # noqa: SLF001 - as above
