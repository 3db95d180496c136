"""How long a system lives on that nobody asks for."""

from __future__ import annotations

import pytest

from moeray.cluster.lease import Lease

R, L = "renew", "look"


@pytest.mark.parametrize(
    ("events", "expired"),
    [
        pytest.param([(15, L), (30, L), (45, L), (60, L)], False, id="it lasts from the start"),
        pytest.param([(15, L), (30, L), (45, L), (60, L), (75, L)], True, id="never renewed"),
        pytest.param([(15, L), (30, R), (30, L), (45, L), (60, L), (75, L), (90, L)], False, id="renewed once"),
        pytest.param([(15, L), (30, R), (30, L), (45, L), (60, L), (75, L), (91, L)], True, id="and not again"),
        pytest.param([(15, L), (500, L)], False, id="those who renew waited for it as well"),
        pytest.param([(15, L), (500, L), (501, R), (515, L)], False, id="and renew now"),
        pytest.param([(15, L), (500, L), (515, L)], True, id="or have gone"),
        pytest.param([(15, L), (44, L), (61, L)], True, id="a look that is a little late is none"),
    ],
)
def test_lease(events, expired):
    now = [0.0]
    lease = Lease(60.0, lambda: now[0])
    seen = False
    for at, what in events:
        now[0] = float(at)
        if what == R:
            lease.renew()
        else:
            assert not seen, "it was over before"
            seen = lease.expired()
    assert seen is expired
    assert lease.was_renewed is any(what == R for _, what in events)
