"""Runs by name on one server: begun by their trainers, apart from each other, there again after a restart."""

import pytest
from atropos_servers import AtroposServer, Clock, registration, scored
from fastapi.testclient import TestClient

from syncline.config.schema import Trajectory
from syncline.trajectory import tenants as module
from syncline.trajectory.tenants import Tenants


@pytest.fixture
def http(tmp_path):
    with Tenants(tmp_path, Trajectory(), token=None) as app, TestClient(app, base_url="http://127.0.0.1:8000") as http:
        yield http


def test_what_one_run_is_told_the_other_does_not_know(http):
    for name, batch_size in (("red", 2), ("blue", 4)):
        http.post(f"/runs/{name}/register", json=registration(batch_size=batch_size))
        http.get(f"/runs/{name}/batch")
    http.post("/runs/red/scored_data", json=scored(1))
    assert http.get("/runs").json() == {"runs": ["blue", "default", "red"]}
    assert [http.get(f"/runs/{name}/info").json()["batch_size"] for name in ("red", "blue")] == [2, 4]
    assert http.get("/runs/blue/batch").json()["batch"] is None
    assert http.get("/runs/blue/reset_data").text == "Reset successful"
    assert http.get("/runs/red/batch").json()["batch"][0]["tokens"] == scored(1)["tokens"]


def test_clients_that_know_no_names_have_a_run_too(http):
    server = AtroposServer(http, Clock())
    server.start(batch_size=2)
    server.push(scored(5))
    assert server.batch() == [5]


@pytest.mark.parametrize("name", ["nobody", "a/b", "%2e%2e", "-x"])
def test_a_run_that_no_trainer_began_is_not_there(http, name, tmp_path):
    assert http.get(f"/runs/{name}/info").status_code == 404
    assert sorted(path.name for path in tmp_path.iterdir()) == ["default"]


def test_there_are_only_so_many(http, monkeypatch):
    monkeypatch.setattr(module, "MAX_RUNS", 2)
    assert http.post("/runs/one/register", json=registration()).status_code == 200
    assert http.post("/runs/two/register", json=registration()).status_code == 409


def test_runs_are_there_after_a_restart_and_ask_for_the_token(tmp_path):
    with Tenants(tmp_path, Trajectory(), token=None) as app, TestClient(app, base_url="http://127.0.0.1:1") as http:
        http.post("/runs/red/register", json=registration(batch_size=2))
        http.get("/runs/red/batch")
        assert http.post("/runs/red/scored_data", json=scored(3)).status_code == 200
    with Tenants(tmp_path, Trajectory(host="0.0.0.0"), token="t") as app, TestClient(app) as http:
        assert [http.get(path).status_code for path in ("/runs", "/runs/red/batch", "/batch")] == [401] * 3
        assert http.get("/runs/red/batch", auth=("x", "t")).json()["batch"][0]["tokens"] == scored(3)["tokens"]
