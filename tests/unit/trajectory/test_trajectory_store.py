"""The queue on disk: what a store says is what the next one finds."""

import json
import os
import sqlite3
from dataclasses import replace

import pytest

from syncline.errors import TrajectoryError
from syncline.testing import make_group
from syncline.trajectory import wire
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.queue import PutOutcome, Refused
from syncline.trajectory.shares import Ask
from syncline.trajectory.status import queue_status
from syncline.trajectory.store import TrajectoryStore, pack, unpack
from syncline.trajectory.tickets import TicketState

LIMITS = QueueLimits(groups_per_step=2, rollouts_per_group=2, max_staleness=1, lease_seconds=100.0)


@pytest.fixture
def open_store(tmp_path):
    def open_store(*, run_id="run-1", limits=LIMITS, now=0.0):
        return TrajectoryStore(
            tmp_path / "t.sqlite", run_id=run_id, limits=limits, weights={"math": 1.0}, clock=lambda: now
        )

    return open_store


def grant(store, num_permits):
    with store.transaction() as queue:
        held = {ticket.permit_id for ticket in queue.ledger.live.values()}
        ask = Ask("math", "0", num_permits)
        queue.ask(ask, held=held)
        return queue.grant(ask)


def put(store, ticket, **group):
    group = make_group("math", ticket.task_index, **group)
    with store.transaction() as queue:
        return store.put(queue, group, ticket.permit_id, packed=pack(wire.encode_group(group)))


def start(store, *, policy_version=0, step=0):
    with store.transaction() as queue:
        queue.start(learner="L", policy_version=policy_version, step=step)


def lease(store, num_groups, lease_id="lease"):
    with store.transaction() as queue:
        packed = store.payloads(queue.lease(num_groups, learner="L", lease_id=lease_id))
    return [unpack(body) for body in packed]


def acknowledge(store, task_indices, step):
    with store.transaction() as queue:
        ids = [f"math-{index}" for index in task_indices]
        queue.acknowledge(ids, learner="L", step=step, policy_version=step)


def status(store):
    with store.transaction() as queue:
        return queue_status(queue)


def rows(tmp_path, query):
    with sqlite3.connect(tmp_path / "t.sqlite") as db:
        return db.execute(query).fetchall()


def test_a_reopened_store_holds_every_kind_of_ticket(open_store):
    with open_store() as store:
        start(store)
        tickets = grant(store, 4)
        for ticket in tickets[:3]:
            put(store, ticket)
        lease(store, 1, "1")
        acknowledge(store, [0], step=1)
        lease(store, 1, "2")
        before = status(store)
    assert (before.num_consumed, before.num_leased, before.num_queued, before.num_permits) == (1, 1, 1, 1)
    with open_store() as store:
        after = status(store)
        silent = replace(before.environments["math"], seconds_since_heard=None)
        assert replace(after, why_waiting="") == replace(before, why_waiting="", environments={"math": silent})
        assert put(store, tickets[3]) is PutOutcome.ACCEPTED
        assert put(store, tickets[0]) is PutOutcome.ACCEPTED
        assert status(store).counters["accepted"] == 4


def test_groups_come_back_byte_for_byte_and_in_order(open_store):
    with open_store() as store:
        start(store)
        first, second = grant(store, 2)
        put(store, second, rewards=(0.1, 1 / 3))
        put(store, first)
    with open_store() as store:
        found = [wire.decode_group(body) for body in lease(store, 2)]
    assert found == [make_group("math", 1, rewards=(0.1, 1 / 3)), make_group("math", 0)]


def test_a_repeated_put_leaves_one_payload_and_a_trained_group_none(open_store, tmp_path):
    with open_store() as store:
        start(store)
        tickets = grant(store, 2)
        for ticket in [*tickets, *tickets]:
            put(store, ticket)
        assert rows(tmp_path, "SELECT count(*) FROM payloads") == [(2,)]
        lease(store, 2)
        acknowledge(store, [0, 1], step=1)
        with store.transaction() as queue:
            queue.commit(learner="L", step=1)
        put(store, tickets[0])
        assert rows(tmp_path, "SELECT count(*) FROM payloads") == [(0,)]
        query = "SELECT environment, task_index, step FROM tickets WHERE state = 'trained' ORDER BY task_index"
        assert rows(tmp_path, query) == [("math", 0, 1), ("math", 1, 1)]


def test_a_restarted_learner_gets_its_groups_from_a_reopened_store(open_store):
    with open_store() as store:
        start(store)
        for ticket in grant(store, 2):
            put(store, ticket)
        lease(store, 2)
        acknowledge(store, [0, 1], step=1)
    with open_store() as store:
        start(store)
        assert [wire.decode_group(body).task_index for body in lease(store, 2)] == [0, 1]


def test_a_store_written_before_dynamic_sampling_goes_on(open_store, tmp_path):
    with open_store() as store:
        start(store)
        grant(store, 1)
    [(body,)] = rows(tmp_path, "SELECT body FROM state")
    state = json.loads(body)
    del state["num_refills"], state["counters"]["replaced"], state["counters"]["unreplaced"]
    with sqlite3.connect(tmp_path / "t.sqlite") as db:
        db.execute("UPDATE state SET body = ?", (json.dumps(state),))
    with open_store(limits=replace(LIMITS, max_refills=1)) as store:
        start(store)
        [ticket] = grant(store, 1)
        assert put(store, ticket, rewards=(1.0, 1.0)) is PutOutcome.REPLACED
        assert rows(tmp_path, "SELECT count(*) FROM payloads") == [(0,)]


def test_leases_and_permits_are_timed_anew_by_the_next_process(open_store):
    with open_store(now=0.0) as store:
        start(store)
        grant(store, 1)
    with open_store(now=5000.0) as store:
        assert status(store).num_permits == 1
        with store.transaction() as queue:
            assert queue.ledger.seconds_to_deadline() == 100.0


def test_a_failure_inside_a_transaction_undoes_it_in_memory_and_on_disk(open_store):
    with open_store() as store:
        start(store)
        [ticket] = grant(store, 1)
        before = status(store)
        with pytest.raises(ZeroDivisionError), store.transaction() as queue:
            queue.give_back(ticket.permit_id, "")
            raise ZeroDivisionError
        assert status(store).num_permits == before.num_permits == 1
        with store.transaction() as queue:
            assert queue.ledger.find(ticket.permit_id).state is TicketState.PERMITTED


def test_a_disk_that_refuses_leaves_the_queue_as_it_was(open_store):
    with open_store() as store:
        start(store)
        [ticket] = grant(store, 1)
        store._db.execute("PRAGMA query_only = 1")
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            put(store, ticket)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            store.check_writable()
        store._db.execute("PRAGMA query_only = 0")
        assert (status(store).num_queued, status(store).counters["accepted"]) == (0, 0)
        assert put(store, ticket) is PutOutcome.ACCEPTED


def test_a_refusal_passes_through_and_changes_nothing(open_store):
    with open_store() as store:
        start(store)
        [ticket] = grant(store, 1)
        with pytest.raises(Refused):
            put(store, ticket, rewards=(1.0,))
        assert put(store, ticket) is PutOutcome.ACCEPTED


def test_commits_reach_the_disk_before_the_answer(open_store):
    with open_store() as store:
        assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_second_process_is_told_who_serves_the_store(open_store):
    with open_store(), pytest.raises(TrajectoryError, match=rf"process {os.getpid()} serves this store; stop it"):
        open_store()
    with open_store():
        pass


def test_a_run_goes_on_in_a_folder_of_another_name(open_store):
    open_store(run_id="first, seed 3").__exit__()
    open_store(run_id="moved, seed 3").__exit__()
    with pytest.raises(TrajectoryError, match="written with run_id 'first, seed 3', but this run has 'first, seed 4'"):
        open_store(run_id="first, seed 4")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"run_id": "run-2"}, "written with run_id 'run-1', but this run has 'run-2'"),
        (
            {"limits": replace(LIMITS, rollouts_per_group=3)},
            "written with rollouts_per_group '2', but this run has '3'",
        ),
    ],
)
def test_a_store_of_another_run_is_refused(open_store, changed, message):
    open_store().__exit__()
    with pytest.raises(TrajectoryError, match=message):
        open_store(**changed)
    open_store().__exit__()


def test_a_store_of_another_schema_is_refused(open_store, tmp_path):
    open_store().__exit__()
    rows(tmp_path, "UPDATE meta SET value = '0' WHERE key = 'schema_version'")
    with pytest.raises(TrajectoryError, match="written with schema_version '0', but this run has '2'"):
        open_store()


def test_a_file_that_is_no_database_is_refused_by_name(open_store, tmp_path):
    (tmp_path / "t.sqlite").write_bytes(b"not a database, but long enough to be taken for one" * 100)
    with pytest.raises(TrajectoryError, match=r"t\.sqlite: cannot be opened as a trajectory store"):
        open_store()


def test_tickets_settled_long_ago_take_no_more_disk(open_store, tmp_path, monkeypatch):
    monkeypatch.setattr("syncline.trajectory.ledger.SETTLED_REMEMBERED", 3)
    with open_store() as store:
        start(store)
        for step in range(1, 9):
            put(store, grant(store, 1)[0], policy_version=step - 1)
            lease(store, 1, str(step))
            acknowledge(store, [step - 1], step=step)
            with store.transaction() as queue:
                queue.commit(learner="L", step=step)
        assert rows(tmp_path, "SELECT task_index FROM tickets ORDER BY rowid") == [(5,), (6,), (7,)]
    with open_store() as store:
        assert status(store).counters["trained"] == 8
        assert grant(store, 1) == [], "no learner has been heard"


def test_permits_want_room_for_groups_as_large_as_the_largest(open_store, tmp_path):
    with open_store() as store:
        start(store)
        with store.transaction() as queue:
            assert store.room(queue) is None, "nobody knows how large a group is"
        put(store, grant(store, 1)[0])
        [(largest,)] = rows(tmp_path, "SELECT length(body) FROM payloads")
        store._max_bytes = store.stored_bytes() + 3 * largest
        grant(store, 2)
        with store.transaction() as queue:
            assert store.room(queue) == 1
