"""What probes read."""

from __future__ import annotations

import pytest

PROBES = (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping"), ("GET", "/ready"))


async def statuses(served) -> dict[str, tuple[int, str]]:
    async with served.http() as http:
        answers = {f"{method} {path}": await http.request(method, path) for method, path in PROBES}
    return {probe: (answer.status_code, answer.json()["status"]) for probe, answer in answers.items()}


async def test_healthy(served):
    assert set((await statuses(served)).values()) == {(200, "ok")}


async def test_a_dead_engine(served):
    served.engine.die()
    assert set((await statuses(served)).values()) == {(503, "engine_dead")}


async def test_a_silent_engine_is_red_until_it_speaks(served):
    served.engine.silent_s = served.state.limits.engine_stall_timeout_s + 1
    assert set((await statuses(served)).values()) == {(503, "engine_stalled")}
    served.engine.silent_s = 0.5
    assert set((await statuses(served)).values()) == {(200, "ok")}


async def test_an_engine_that_speaks_and_does_not_get_on_is_red(served):
    served.engine.silent_s = 0.5
    served.engine.stuck_s = served.state.limits.engine_stall_timeout_s + 1
    assert set((await statuses(served)).values()) == {(503, "engine_stalled")}
    served.engine.stuck_s = 0.0
    assert set((await statuses(served)).values()) == {(200, "ok")}


async def test_draining_is_healthy_and_not_ready(served):
    served.state.door.close()
    seen = await statuses(served)
    assert seen.pop("GET /ready") == (503, "draining")
    assert set(seen.values()) == {(200, "ok")}


@pytest.mark.parametrize("path", ["/health", "/ping", "/ready", "/metrics"])
async def test_probes_need_no_key(guarded, path):
    async with guarded.http() as http:
        assert (await http.get(path)).status_code == 200
