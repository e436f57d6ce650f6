"""A server that was started for no run, as `run-api` is: the learner says what holds, and anybody may sample for it."""

from collections.abc import Iterator
from typing import Any

import pytest
from atropos_servers import LIMITS, environment, our_server, registration, scored
from fastapi.testclient import TestClient

from syncline.config.schema import Trajectory
from syncline.testing import make_group
from syncline.trajectory import wire
from syncline.trajectory.atropos_wire import Registration
from syncline.trajectory.tenants import Tenants


class OpenServer:
    """Asked as our clients ask."""

    def __init__(self, http: TestClient) -> None:
        self.http = http

    def post(self, path: str, body: dict[str, Any], *, status: int = 200) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def start(self, run_id: str = "red", *, step: int = 0, learner: str = "L", **changes: Any) -> None:
        terms = {"groups_per_step": 2, "rollouts_per_group": 3, "max_staleness": 0, "max_refills": 0} | changes
        told = Registration(**registration(batch_size=6))
        body = wire.RunTerms(run_id=run_id, registration=told, **terms).model_dump()
        self.post("/start", {"learner": learner, "policy_version": step, "step": step, "terms": body})

    def permits(self, num: int = 9, *, status: int = 200, held: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        body = {"environment": "gsm8k", "worker": "0", "num_permits": num, "held": list(held), "timeout_seconds": 0.0}
        return self.post("/permits", body, status=status).get("permits", [])

    def put(self, permit: dict[str, Any], *, size: int = 3, status: int = 200) -> Any:
        group = make_group("gsm8k", permit["task_index"], rewards=(0.0, 1.0, 0.5)[:size], group_id=permit["permit_id"])
        answer = self.http.post(
            f"/groups?permit_id={permit['permit_id']}",
            content=wire.encode_group(group),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == status, answer.text
        return answer.json()

    def lease(self, num: int = 2) -> int:
        body = {"learner": "L", "lease_id": "one", "num_groups": num, "timeout_seconds": 0.0}
        return len(self.post("/lease", body)["groups"])


@pytest.fixture
def server(tmp_path) -> Iterator[OpenServer]:
    with Tenants(tmp_path, Trajectory(), token=None) as app, TestClient(app, base_url="http://127.0.0.1:1") as http:
        yield OpenServer(http)


def test_an_environment_may_come_before_the_learner_and_samples_when_it_is_there(server):
    assert server.permits(status=429) == []
    server.start()
    permits = server.permits()
    assert len(permits) == 2, "what the learner's terms want at once"
    assert "run.rollouts_per_group is 3" in server.put(permits[0], size=2, status=409)["error"]
    for permit in permits:
        server.put(permit)
    assert server.lease() == 2


def test_environments_of_the_atropos_wire_are_told_what_the_learner_said(server):
    assert server.http.get("/info").json() == {"batch_size": -1, "max_token_len": -1}
    assert server.post("/register-env", environment())["status"] == "wait for trainer to start"
    server.start()
    assert server.http.get("/info").json() == {"batch_size": 6, "max_token_len": 128}
    assert server.post("/register-env", environment())["num_steps"] == 100
    server.post("/scored_data", scored(1, 3))
    server.put(server.permits()[0])
    assert server.lease() == 2


def test_another_run_finds_nothing_of_the_one_before(server):
    server.start()
    kept, held = server.permits()
    server.put(kept)
    server.start("blue", learner="L")
    assert server.http.get("/status").json()["queue_size"] == 0
    assert server.put(held)["outcome"] == "accepted", "who was sampling goes on for the new one"
    assert server.http.get("/status").json()["queue_size"] == 1


def test_a_learner_that_resumes_finds_what_it_left(server):
    server.start(max_staleness=1)
    for permit in server.permits(2):
        server.put(permit)
    server.start(step=1, max_staleness=1)
    assert server.lease() == 2


def test_terms_change_nothing_on_a_server_that_was_started_for_a_run(tmp_path):
    with our_server(tmp_path, limits=LIMITS, weights={"gsm8k": 1.0}) as ours:
        server = OpenServer(ours.http)
        server.start(groups_per_step=7)
        assert len(server.permits()) == LIMITS.groups_per_step


def test_terms_hold_after_a_restart_of_the_server(tmp_path):
    for restarted in (False, True):
        with Tenants(tmp_path, Trajectory(), token=None) as app, TestClient(app, base_url="http://127.0.0.1:1") as http:
            server = OpenServer(http)
            if not restarted:
                server.start(groups_per_step=5)
            assert server.http.get("/info").json()["batch_size"] == 6
            assert server.http.get("/status").json()["capacity"] == 5


def test_groups_of_equal_scores_are_replaced_whoever_sends_them(server):
    server.start(max_refills=1)
    for mark, queued in ((1, 0), (2, 1)):
        group = scored(mark, 3, scores=[1.0, 1.0, 1.0])
        assert server.post("/scored_data", group) == {"status": "received"}
        assert server.http.get("/status").json()["queue_size"] == queued
    server.post("/scored_data", scored(3, 3))
    assert server.lease() == 2
    counters = server.http.get("/status").json()["counters"]
    assert (counters["replaced"], counters["unreplaced"]) == (1, 1)
