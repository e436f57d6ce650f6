"""The faults of Atropos' own server, A1 to A15: each test passes on ours and fails on `atroposlib`'s."""

import asyncio
import gzip
import json
from typing import Any

import pytest
from atropos_servers import AtroposServer, environment, our_server, registration, scored, their_server

from syncline.errors import ConfigError
from syncline.trajectory import atropos_run
from syncline.trajectory.guard import needed_token

JSON = {"Content-Type": "application/json"}
THEIRS = pytest.param("theirs", marks=pytest.mark.xfail(strict=True, reason="the fault itself"))


@pytest.fixture(params=["ours", THEIRS])
def kind(request) -> str:
    return request.param


@pytest.fixture
def server(kind, tmp_path):
    with our_server(tmp_path) if kind == "ours" else their_server() as server:
        yield server


def test_a1_a_group_posted_before_the_trainer_registers_does_not_brick_the_server(server):
    server.post("/scored_data", scored(9))
    server.start()
    env_id = server.register_env()
    server.push(scored(0, env_id=env_id), scored(1, env_id=env_id))
    assert server.batch() == [0, 1]


def test_a2_registering_again_takes_what_the_trainer_says_now(server):
    server.start(batch_size=4)
    server.register(batch_size=8, max_token_len=64, starting_step=3, num_steps=9)
    assert server.get("/info").json() == {"batch_size": 8, "max_token_len": 64}
    answer = server.post("/register-env", environment()).json()
    assert (answer["starting_step"], answer["num_steps"], server.get("/status").json()["current_step"]) == (3, 9, 3)


def test_a3_a_batch_whose_trainer_died_is_handed_out_again(server):
    server.start()
    server.push(scored(0), scored(1), scored(2), scored(3))
    assert server.batch() == [0, 1]
    server.register(starting_step=0)
    assert [server.batch(), server.batch(), server.batch()] == [[0, 1], [2, 3], None]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a4_a_number_json_cannot_carry_is_refused_when_posted(server, value):
    server.start()
    body = json.dumps(scored(0)).replace('"scores": [0.0', f'"scores": [{value}')
    assert value in body
    assert server.http.post("/scored_data", content=body, headers=JSON).status_code == 422
    server.push(scored(1), scored(2))
    assert server.batch() == [1, 2]


MALFORMED: list[tuple[str, str, Any]] = [
    ("/scored_data", "scores", [1.0, 0.0, 0.5]),
    ("/scored_data", "masks", [[-100, 0, 7]]),
    ("/scored_data", "masks", [[-100, 0], [-100, 0]]),
    ("/scored_data", "masks", [[-100, 5, 7], [-100, 0, 8]]),
    ("/scored_data", "inference_logprobs", [[1.0, -0.5], [1.0, -0.5]]),
    ("/scored_data", "advantages", [[1.0, 1.0, 1.0]]),
    ("/scored_data", "overrides", [{}]),
    ("/scored_data", "tokens", [[], []]),
    ("/scored_data", "tokens", [[1, -3, 7], [1, 0, 8]]),
    ("/register-env", "group_size", 0),
    ("/register-env", "min_batch_allocation", 1.5),
    ("/register-env", "max_token_length", 0),
    ("/register", "batch_size", 0),
]


@pytest.mark.parametrize(("path", "field", "value"), MALFORMED)
def test_a5_fields_that_contradict_each_other_are_refused(server, path, field, value):
    server.start()
    bodies = {"/scored_data": scored(0), "/register-env": environment(), "/register": registration()}
    assert server.post(path, bodies[path]).status_code == 200
    answer = server.post(path, bodies[path] | {field: value})
    assert answer.status_code == 422
    assert field in answer.text


@pytest.mark.parametrize(
    ("batch_size", "sizes", "expected"),
    [
        (4, (3, 3), [[0], None]),
        (8, (6, 4), [[0], None]),
        (8, (6, 4, 4), [[1, 2], None]),
        (8, (6, 1, 4, 3), [[1, 2, 3], None]),
    ],
)
def test_a6_sizes_that_do_not_divide_the_batch_are_served(server, batch_size, sizes, expected):
    server.start(batch_size=batch_size)
    server.push(*(scored(i, size) for i, size in enumerate(sizes)))
    assert [server.batch() for _ in expected] == expected


def test_a6_a_group_larger_than_the_batch_is_refused_and_blocks_nobody(server):
    server.start(batch_size=4)
    assert server.post("/scored_data", scored(0, 8)).status_code == 409
    server.push(scored(1), scored(2))
    assert server.batch() == [1, 2]


def test_a7_an_environment_that_went_silent_does_not_hold_up_its_promised_share(server):
    server.start(batch_size=4)
    server.register_env(min_batch_allocation=0.5)
    env_id = server.register_env()
    server.push(scored(0, env_id=env_id), scored(1, env_id=env_id))
    if (why := server.get("/batch").json().get("why_waiting")) is not None:
        assert "'math_0' has 0 of the 2 sequences" in why
    server.clock.now += atropos_run.PATIENCE_SECONDS
    assert server.batch() == [0, 1]


def test_a8_an_environment_of_weight_0_has_a_status(server):
    server.start()
    answer = server.status_env(server.register_env(weight=0.0))
    assert (answer.status_code, answer.json()["env_weight"]) == (200, 0.01)


@pytest.mark.parametrize("num_environments", [0, 1])
def test_a8_the_status_of_nobody_is_a_fault_of_the_caller(server, num_environments):
    server.start()
    for _ in range(num_environments):
        server.register_env()
    assert server.status_env(1).status_code == 409


def test_a9_batches_are_served_oldest_first_and_counted_one_by_one(server):
    server.start(batch_size=2)
    server.push(scored(0), scored(1), scored(2))
    served = [(server.batch(), server.get("/status").json()["current_step"]) for _ in range(3)]
    assert served == [([0], 1), ([1], 2), ([2], 3)]


def test_a10_a_negative_env_id_is_nobody(server):
    server.start()
    server.register_env()
    assert server.status_env(-1).status_code == 409
    assert server.post("/scored_data", scored(0, env_id=-1)).status_code == 409
    assert server.post("/disconnect-env", {"env_id": -1}).json()["status"] == "failure"


def test_a11_a_gzip_body_that_ends_early_is_the_callers_fault(server):
    body = gzip.compress(json.dumps(scored(0)).encode())
    headers = JSON | {"Content-Encoding": "gzip"}
    assert server.http.post("/scored_data", content=body[:-9], headers=headers).status_code == 400


def test_a11_a_body_that_unpacks_to_more_than_is_allowed_is_not_unpacked(server):
    body = gzip.compress(b"[" + b" " * (4 << 20) + b"]")
    assert len(body) < 10_000
    headers = JSON | {"Content-Encoding": "gzip"}
    assert server.http.post("/scored_data_list", content=body, headers=headers).status_code == 413


def test_a12_a_reset_leaves_nothing_behind(server):
    server.start()
    server.push(scored(0), scored(1))
    assert server.get("/latest_example").json()["tokens"]
    assert server.get("/reset_data").text == "Reset successful"
    assert server.get("/latest_example").json()["tokens"] == []
    server.start()
    assert server.batch() is None


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}]
)
def test_a13_a_page_of_another_site_changes_nothing(server, headers):
    server.start()
    server.push(scored(0), scored(1))
    assert server.get("/reset_data", headers=headers).status_code == 403
    assert server.post("/scored_data", scored(2), headers=headers).status_code == 403
    assert server.batch() == [0, 1]


def test_a13_an_address_others_can_reach_needs_a_token(tmp_path):
    with pytest.raises(ConfigError, match="SYNCLINE_TRAJECTORY_TOKEN"):
        needed_token("0.0.0.0", None)
    with our_server(tmp_path, token="secret") as server:
        assert server.get("/reset_data").status_code == 401
        assert server.get("/reset_data", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert server.get("/info", auth=("syncline", "secret")).status_code == 200
        assert server.get("/reset_data", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a14_batches_are_packed_off_the_event_loop(server, kind, monkeypatch):
    def on_the_loop() -> bool:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return False
        return True

    module, name = (
        (atropos_run, "choose")
        if kind == "ours"
        else (pytest.importorskip("atroposlib.api.server"), "grab_exact_from_heterogeneous_queue")
    )
    pack, seen = getattr(module, name), []
    monkeypatch.setattr(module, name, lambda *args, **options: seen.append(on_the_loop()) or pack(*args, **options))
    server.start()
    server.push(scored(0), scored(1))
    assert server.batch() == [0, 1]
    assert set(seen) == {False}


def test_a15_a_full_queue_says_so(server):
    server.start(batch_size=4)
    refused: Any = None
    for mark in range(200):
        refused = server.post("/scored_data", scored(mark))
        if refused.status_code != 200:
            break
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "5")
    assert "capacity of 32 groups is taken" in refused.json()["error"]
    assert server.batch() == [0, 1]
    server.push(scored(500))


def test_the_server_of_theirs_is_a_real_one():
    """The marks above expect failures; this one does not."""
    with their_server() as server:
        assert isinstance(server, AtroposServer)
        server.start()
        server.push(scored(0), scored(1))
        assert server.batch() == [0, 1]
