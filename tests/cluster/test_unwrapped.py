"""What of Ray's errors a caller of an actor gets to see."""

from concurrent.futures import Future

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from moeray.cluster.ray_cluster import unwrapped
from moeray.errors import ActorLostError, CheckpointError, MoerayError

OWN = CheckpointError("tensor w of file f is truncated; fetch it again")


def task_error(cause):
    return RayTaskError("host", f"Traceback:\n  somewhere\n{cause!r}", cause, proctitle="x", pid=1, ip="10.0.0.1")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (task_error(OWN), CheckpointError, "tensor w of file f is truncated; fetch it again"),
        (task_error(KeyError("layer")), MoerayError, "actor a failed: .*KeyError"),
        (ActorDiedError(), ActorLostError, "actor a is gone: The actor died unexpectedly"),
        (ActorDiedError(task_error(ValueError("no such device"))), MoerayError, "actor a failed: .*no such device"),
        (ActorUnavailableError("no route\nto it", None), MoerayError, "actor a failed: .*no route to it"),
    ],
)
def test_an_error_is_the_actors_own_in_one_line(error, kind, words):
    inner = Future()
    outer = unwrapped(inner, "actor a")
    inner.set_exception(error)
    with pytest.raises(kind, match=words) as caught:
        outer.result(1)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_an_answer_is_passed_on():
    inner = Future()
    outer = unwrapped(inner, "actor a")
    inner.set_result(7)
    assert outer.result(1) == 7
