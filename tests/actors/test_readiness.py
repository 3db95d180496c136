"""Whether the system serves yet, as it is told to those who ask."""

import pytest

from moeray.actors.readiness import Readiness
from moeray.actors.spec import SystemInfo
from moeray.errors import MoerayError

INFO = SystemInfo("m", None, b"token", "system", (), 512, 320, ())


@pytest.mark.parametrize(
    ("error", "info", "started", "stopping", "status"),
    [
        (None, None, False, False, ("loading", "opening the model")),
        (None, INFO, False, False, ("loading", "opening the model")),
        (None, INFO, True, False, ("ready", "ready")),
        (None, INFO, True, True, ("stopping", "stopping")),
        ("no such folder", None, False, True, ("failed", "no such folder")),
    ],
)
def test_the_state(error, info, started, stopping, status):
    readiness = Readiness()
    readiness.phase, readiness.error, readiness.info = "opening the model", error, info
    if started:
        readiness.succeed()
    said = readiness.state(stopping)
    assert (said["status"], said["detail"]) == status
    assert (said["info"] is INFO) == (status[0] == "ready")


def test_the_first_end_of_a_start_holds():
    readiness = Readiness()
    readiness.fail(MoerayError("the first"))
    readiness.fail(MoerayError("the second"))
    readiness.succeed()
    with pytest.raises(MoerayError, match="the first"):
        readiness.wait(1.0, lambda: None)
    with pytest.raises(MoerayError, match="still starting after 0 s"):
        Readiness().wait(0.0, lambda: None)
