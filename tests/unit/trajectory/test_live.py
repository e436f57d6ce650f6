"""What the run's page and Prometheus are sent. The page itself is tested in a browser."""

import json

import pytest
from atropos_servers import our_server
from prometheus_client.parser import text_string_to_metric_families

from syncline.observe.sinks import METRICS_FILE, ROLLOUTS_FILE
from syncline.trajectory import live
from syncline.trajectory.ledger import QueueLimits

LIMITS = QueueLimits(groups_per_step=2, rollouts_per_group=2, max_staleness=1, lease_seconds=60.0)


@pytest.fixture
def server(tmp_path):
    with our_server(tmp_path, limits=LIMITS, weights={"math": 3.0, "code": 1.0}) as server:
        yield server


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_steps_are_read_from_where_the_page_stopped(server, tmp_path):
    file = tmp_path / METRICS_FILE
    assert server.get("/ui/steps").json() == {"start": 0, "end": 0, "rows": []}
    file.write_text(lines({"step": 1}, {"step": 2}) + '{"step": ')
    first = server.get("/ui/steps").json()
    assert (first["rows"], first["end"]) == ([{"step": 1}, {"step": 2}], 24)
    file.write_text(lines({"step": 1}, {"step": 2}, {"step": 3}))
    assert server.get("/ui/steps?offset=24").json()["rows"] == [{"step": 3}]


def test_a_file_that_was_cut_is_read_anew(server, tmp_path):
    (tmp_path / METRICS_FILE).write_text(lines({"step": 1}))
    for offset in (7, 24):
        answer = server.get(f"/ui/steps?offset={offset}")
        assert (answer.status_code, "begin again at 0" in answer.json()["error"]) == (409, True)


def test_rollouts_are_paged_from_the_newest_back_and_a_long_one_comes_whole(server, tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PIECE_BYTES", 64)
    rows = [{"step": 1}, {"step": 2, "said": "x" * 500}, {"step": 3}, {"step": 4}]
    (tmp_path / ROLLOUTS_FILE).write_text(lines(*rows) + "{")
    seen, before = [], None
    for _ in rows:
        piece = server.get("/ui/rollouts" + ("" if before is None else f"?before={before}")).json()
        seen = piece["rows"] + seen
        before = piece["start"]
        if not before:
            break
    assert seen == rows


def test_the_page_may_run_its_own_script_only(server):
    page, script = server.get("/ui"), server.get("/ui/live.js")
    assert page.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'; ")
    assert (page.status_code, script.status_code, script.headers["content-type"]) == (
        *(200, 200),
        "text/javascript; charset=utf-8",
    )
    assert "://" not in page.text.replace("http://www.w3.org/2000/svg", ""), "the page asks nobody else"


def test_prometheus_reads_queue_environments_and_the_newest_step(server, tmp_path):
    (tmp_path / METRICS_FILE).write_text(lines({"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5, "kl": None}))
    server.post("/start", {"learner": "L", "policy_version": 4, "step": 2})
    ask = {"environment": "math", "worker": "0", "num_permits": 3, "held": [], "timeout_seconds": 0.0}
    assert len(server.post("/permits", ask).json()["permits"]) == 3
    answer = server.get("/metrics")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert {
        ("syncline_policy_version",): 4,
        ("syncline_capacity",): 4,
        ("syncline_groups", "permits"): 3,
        ("syncline_groups", "queued"): 0,
        ("syncline_granted_total",): 3,
        ("syncline_accepted_total",): 0,
        ("syncline_batch_ready",): 0,
        ("syncline_environment_granted_total", "math"): 3,
        ("syncline_environment_weight", "code"): 1,
        ("syncline_run", "reward"): 0.5,
        ("syncline_run", "step"): 2,
    }.items() <= found.items()
    assert ("syncline_run", "kl") not in found and ("syncline_environment_seconds_since_heard", "code") not in found
    assert found["process_resident_memory_bytes",] > 1 << 20
