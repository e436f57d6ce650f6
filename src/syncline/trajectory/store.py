"""The queue on disk: SQLite in WAL mode with synchronous=FULL, so what was answered survives `kill -9` and power loss.

Every transition of the queue and its rows are one transaction, committed before the caller sees the result; when
that fails, the queue in memory is thrown away and read again from disk. One process at a time: a lock file is held
for as long as the store is open, and the kernel frees it when the process dies.
"""

import fcntl
import os
import sqlite3
import threading
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from syncline.errors import TrajectoryError
from syncline.trajectory.ledger import SETTLED_REMEMBERED, QueueLimits
from syncline.trajectory.queue import PutOutcome, Refused, TrajectoryQueue
from syncline.trajectory.tickets import HOLDS_GROUP, LIVE, QueueState, Ticket, TicketState, Wire
from syncline.types import RolloutGroup

STORE_NAME = "trajectories.sqlite"
SCHEMA_VERSION = 2
_STATE = TypeAdapter(QueueState)
_COLUMNS = [field.name for field in fields(Ticket)]
_SCHEMA = f"""
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 1), body TEXT NOT NULL);
    CREATE TABLE tickets ({", ".join(_COLUMNS)}, PRIMARY KEY (permit_id));
    CREATE INDEX tickets_by_state ON tickets (state);
    CREATE TABLE payloads (permit_id TEXT PRIMARY KEY, body BLOB NOT NULL);
"""


class StoreFull(Refused):
    """The store may not grow further."""


class TrajectoryStore:
    """A `TrajectoryQueue` whose every change is on disk. Use as a context manager; safe to use from several threads."""

    def __init__(
        self,
        path: Path,
        *,
        run_id: str,
        limits: QueueLimits,
        weights: Mapping[str, float],
        clock: Callable[[], float],
        max_bytes: int = 64 << 30,
    ) -> None:
        """Raises `TrajectoryError` when another process holds the store, or it was written for another run."""
        self.path = path
        self.run_id = run_id
        self._limits, self._weights, self._clock = limits, weights, clock
        self._max_bytes = max_bytes
        self._largest = 0
        self._guard = threading.Lock()
        self._queue: TrajectoryQueue | None = None
        self._lock_file = _lock(path.with_name(path.name + ".lock"))
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._prepare({"run_id": run_id, "rollouts_per_group": str(limits.rollouts_per_group)})
        except BaseException as error:
            os.close(self._lock_file)
            if isinstance(error, sqlite3.Error):
                raise TrajectoryError(f"{path}: cannot be opened as a trajectory store ({error})") from error
            raise

    def __enter__(self) -> "TrajectoryStore":
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._db.close()
            os.close(self._lock_file)

    @contextmanager
    def transaction(self) -> Iterator[TrajectoryQueue]:
        """The queue, to be asked and changed; changes are on disk when the block has been left.

        A `Refused` passes through once what had expired is written; any other exception undoes the block.
        Raises `sqlite3.Error` when the disk refuses.
        """
        refusal = None
        with self._guard:
            self._db.execute("BEGIN")
            try:
                queue = self._queue = self._queue or self._load()
                try:
                    yield queue
                except Refused as error:
                    refusal = error
                self._save(queue)
                self._db.execute("COMMIT")
            except BaseException:
                self._queue = None
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        if refusal:
            raise refusal

    def put(self, queue: TrajectoryQueue, group: RolloutGroup, permit_id: str, *, packed: bytes) -> PutOutcome:
        """`TrajectoryQueue.put`, and the group's JSON with it, as `pack` made it. Call inside `transaction`."""
        if not self.has_room(len(packed)):
            raise StoreFull(self.why_full)
        outcome = queue.put(group, permit_id)
        ticket = queue.ledger.find(permit_id)
        if ticket and ticket.state in HOLDS_GROUP:
            self.keep(permit_id, packed)
        return outcome

    @property
    def why_full(self) -> str:
        return (
            f"the store holds trajectory.max_store_bytes = {self._max_bytes}; room comes back when the learner commits "
            "a checkpoint (learner.checkpoint_interval)"
        )

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more may be stored. Call inside `transaction`."""
        return self.stored_bytes() + num_bytes <= self._max_bytes

    def room(self, queue: TrajectoryQueue) -> int | None:
        """Groups beyond those permitted that still fit if they are as large as the largest so far; `None` before there
        was one. Call inside `transaction`."""
        if not self._largest:
            return None
        fit = (self._max_bytes - self.stored_bytes()) // self._largest
        return max(0, fit - queue.ledger.count(TicketState.PERMITTED))

    def stored_bytes(self) -> int:
        """On disk and in use. Call inside `transaction`."""
        page, count, free = (self._pragma(name) for name in ("page_size", "page_count", "freelist_count"))
        return page * (count - free)

    def keep(self, permit_id: str, packed: bytes) -> None:
        """The group's JSON, as it came and as `pack` made it. Call inside `transaction`."""
        self._largest = max(self._largest, len(packed))
        self._db.execute("INSERT OR IGNORE INTO payloads VALUES (?, ?)", (permit_id, packed))

    def payloads(self, tickets: Iterable[Ticket]) -> list[bytes]:
        """The groups of these tickets, as `pack` made them. Call inside `transaction`."""
        query = "SELECT body FROM payloads WHERE permit_id = ?"
        return [self._db.execute(query, (t.permit_id,)).fetchone()[0] for t in tickets]

    def _pragma(self, name: str) -> int:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    def check_writable(self) -> None:
        """Writes and commits one row. Raises `sqlite3.Error`."""
        with self._guard:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('checked_by', ?)", (str(os.getpid()),))

    def _prepare(self, identity: Mapping[str, str]) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        identity = {"schema_version": str(SCHEMA_VERSION), **identity}
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            rows = "".join(f"INSERT INTO meta VALUES ({_quote(k)}, {_quote(v)});" for k, v in identity.items())
            self._db.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} {rows} COMMIT;")
        found = dict(self._db.execute("SELECT key, value FROM meta"))
        for key, value in identity.items():
            if _kept(found.get(key, "")) != _kept(value):
                raise TrajectoryError(
                    f"{self.path}: written with {key} {found.get(key)!r}, but this run has {value!r}; "
                    "resume the run that wrote it, or give run.dir another folder"
                )

    def _load(self) -> TrajectoryQueue:
        row = self._db.execute("SELECT body FROM state").fetchone()
        self._largest = self._db.execute("SELECT ifnull(max(length(body)), 0) FROM payloads").fetchone()[0]
        live = ", ".join(_quote(state) for state in LIVE)
        select = f"SELECT {', '.join(_COLUMNS)} FROM tickets WHERE state"
        rows = self._db.execute(f"{select} NOT IN ({live}) ORDER BY rowid DESC LIMIT {SETTLED_REMEMBERED}").fetchall()[
            ::-1
        ]
        rows += self._db.execute(f"{select} IN ({live}) ORDER BY rowid").fetchall()
        return TrajectoryQueue(
            self._limits,
            self._weights,
            clock=self._clock,
            new_id=lambda: uuid.uuid4().hex,
            state=_STATE.validate_json(row[0]) if row else None,
            tickets=[_ticket(row) for row in rows],
        )

    def _save(self, queue: TrajectoryQueue) -> None:
        if not queue.ledger.dirty:
            return
        changed = queue.ledger.take_changes()
        marks = ", ".join("?" * len(_COLUMNS))
        self._db.executemany(f"INSERT OR REPLACE INTO tickets VALUES ({marks})", [astuple(t) for t in changed])
        gone = [(t.permit_id,) for t in changed if t.state not in HOLDS_GROUP]
        self._db.executemany("DELETE FROM payloads WHERE permit_id = ?", gone)
        forgotten = [(permit_id,) for permit_id in queue.ledger.take_forgotten()]
        self._db.executemany("DELETE FROM tickets WHERE permit_id = ?", forgotten)
        self._db.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (_STATE.dump_json(queue.state).decode(),))


def _kept(identity: str) -> str:
    """What stays when the run's folder is renamed: of `name, seed 0` the seed."""
    return identity.rpartition(", ")[2]


def pack(body: bytes) -> bytes:
    """A group's JSON as it is stored. Takes a while: not to be done inside a transaction.

    Token ids and log-probabilities hardly repeat, so looking for repetitions costs time and gains nothing.
    """
    packer = zlib.compressobj(level=1, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(body) + packer.flush()


def unpack(packed: bytes) -> bytes:
    return zlib.decompress(packed)


def _ticket(row: tuple[Any, ...]) -> Ticket:
    ticket = Ticket(*row)
    ticket.state, ticket.wire = TicketState(ticket.state), Wire(ticket.wire)
    return ticket


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _lock(path: Path) -> int:
    """Holds `path` for this process. Raises `TrajectoryError` naming the process that holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(handle, 32, 0).decode() or "unknown"
        os.close(handle)
        raise TrajectoryError(
            f"{path}: process {pid} serves this store; stop it, or give run.dir another folder"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle
