"""Ray's many lines about a dead worker become one that says what happened."""

import pytest

from stability_search.search.deaths import Death

ACTOR_ID = "ef2dc4bace777405b45c54fd01000000"
KILLED = f"""\
The actor died unexpectedly before finishing this task.
\tclass_name: ResourceTrainable
\tactor_id: {ACTOR_ID}
\tpid: 8906
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit
The actor never ran - it was cancelled before it started running.
"""
NODE = f"""\
The actor died unexpectedly before finishing this task.
\tactor_id: {ACTOR_ID}
The actor died because its node has died. Node Id: ecc3
"""
RAISED = f"""\
The actor died because of an error raised in its creation task, ray::A.__init__() (pid=8936, \
ip=192.0.2.2, actor_id={ACTOR_ID}, repr=<A object>)
  File "worker.py", line 15, in __init__
FileNotFoundError: the task's files have not come to this node

"""
STEP = f"""\
ray::ResourceTrainable.train() (pid=7, ip=192.0.2.2, actor_id={ACTOR_ID})
  File "worker.py", line 15, in step
OSError: no space
"""
MEMORY = "1 worker(s) were killed due to the node running low on memory. Memory on the node was"


@pytest.mark.parametrize(
    ("text", "reason", "actor_id"),
    [
        (KILLED, "its worker died", ACTOR_ID),
        (NODE, "its node died", ACTOR_ID),
        (RAISED, "FileNotFoundError: the task's files have not come to this node", ACTOR_ID),
        (STEP, "OSError: no space", ACTOR_ID),
        (MEMORY, "ended by Ray's memory monitor", ""),
        ("", "its worker died", ""),
        ("\n \n", "its worker died", ""),
        ("Something new.\nAnd more.", "Something new.", ""),
    ],
)
def test_an_error_of_rays_becomes_a_line_and_tells_whose_it_was(
    text: str, reason: str, actor_id: str
) -> None:
    assert Death.from_text(text) == Death(
        reason=reason,
        actor_id=actor_id,
        is_out_of_memory=text == MEMORY,
        is_node_gone=text == NODE,
    )
