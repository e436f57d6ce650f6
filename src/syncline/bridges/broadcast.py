"""`broadcast`: full weights to engines on other GPUs, in flat buckets, one collective call a bucket.

The learner is rank 0 of a process group of its own, each worker of each engine another rank (`collective.py`); all
compute the same plan of buckets (`buckets.py`) and go through it at once (`pipeline.py`). Engines keep a copy, so they
sample on while a step runs and pause for the transfer alone. Who waits for whom: each engine is asked, in a thread of
its own, to receive; meanwhile this thread sends. An engine's answer that is a fault ends the sending, a fault in the
sending is the learner's last word to the engines; then every engine is paused and every party named. The next publish
connects anew, with whoever is there.

vLLM's own weight transfer is not used: its receiving end loads tensor by tensor through the layerwise reload, its
interfaces of 0.26 and of 0.32 exclude each other, and none of its backends runs on a CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar
from uuid import uuid4

import torch

from syncline.bridges.buckets import Entry, plan
from syncline.bridges.collective import CLOSE_SECONDS, Deadline, Group, in_thread, listen, say_last
from syncline.bridges.copies import CopyingBridge
from syncline.bridges.fleet import Fleet, refuse_other_model
from syncline.bridges.gather import Export, Others, gathered
from syncline.bridges.handles import device_name
from syncline.bridges.invitation import Invitation, manifest_of
from syncline.bridges.measure import LearnerDigests
from syncline.bridges.pipeline import Sender
from syncline.bridges.receipt import model_digest, whole
from syncline.bridges.sparse import SparseSender
from syncline.bridges.stopwatch import Stopwatch
from syncline.config.schema import Bridge
from syncline.errors import EngineError, SyncError, SynclineError
from syncline.protocols import EngineControl, Paused, Receipt, Received, SyncReport

LAST_WORDS_SECONDS = 5.0
"""After a fault: how long the engines have to say what they saw of it."""
Answer = TypeVar("Answer")


class BroadcastBridge(CopyingBridge):
    """See the module. `export(model)` yields the parameters under their checkpoint names, adapters merged; a learner
    of several ranks runs `GatheringBridge` on the others. `host` is this machine's address as the engines see it."""

    def __init__(
        self, engines: Sequence[EngineControl], config: Bridge, *, export: Export, host: str = "127.0.0.1"
    ) -> None:
        self._fleet = Fleet(engines, config)
        self._digests = LearnerDigests(lambda model: ((name, whole(t)) for name, t in gathered(export(model))))
        self._config = config
        self._export = export
        self._host = host
        self._others = Others()
        self._manifest: tuple[Entry, ...] = ()
        self._device = torch.device("cpu")
        self._group: Group | None = None
        """`None` while the learner is in no group with its engines."""
        self._members: tuple[EngineControl, ...] = ()
        """Engines of the group."""
        self._sent_digest: str | None = None
        """Of what the sender last sent, proved: an engine that holds it needs only what changed."""
        self._closing: list[Future[None]] = []

    def attach(self, model: Any) -> None:
        self._manifest, self._device = manifest_of(self._export(model))
        with self._others.told():
            self._fleet.wait_until_ready()
            self._fleet.refuse_other_model({entry.name: entry.kind for entry in self._manifest})
            end = SparseSender if self._config.sparse else Sender
            self._sender = end(plan(self._manifest, bucket_bytes=self._config.bucket_bytes), self._device)
            self._join()

    def _admit(self, engine: EngineControl) -> None:
        refuse_other_model(engine, {entry.name: entry.kind for entry in self._manifest})

    def close(self) -> None:
        self._leave("the learner closed its bridge")
        wait_for(self._closing, timeout=CLOSE_SECONDS)
        self._fleet.close()

    def _publish(self, model: Any, policy_version: int) -> SyncReport:
        clock = Stopwatch()
        with self._others.told() as word, self._pausing() as pausing:
            digests = self._digests.of(model)
            expected = Receipt(policy_version, model_digest(digests))
            clock.lap("digest")
            paused = pausing.result()
            clock.lap("pause")
            served = [engine.receipt for engine in paused]
            self._fleet.refuse_backwards(policy_version, served)
            moves = any(receipt.digest != expected.digest for receipt in served)
            if any(receipt.digest != self._sent_digest for receipt in served):
                self._sender.forget()
            group = self._connected(paused) if moves else None
            clock.lap("connect")
            word["moves"] = moves
        with self._others.told():
            if group:
                self._sent_digest = None
                received = self._move(group, model, expected)
                clock.lap("transfer")
                clock.split("transfer", "prove", max(answer.prove_seconds for answer in received))
                self._fleet.proved([answer.receipt for answer in received], expected, digests=digests)
                self._sent_digest = expected.digest
            else:
                self._fleet.adopt(expected, digests=digests)
            clock.lap("prove")
        moved, changed = (self._sender.num_bytes, self._sender.changed_fraction) if group else (0, None)
        return SyncReport(expected, moved, clock.total, clock.total, dict(clock.parts), changed)

    @contextmanager
    def _pausing(self) -> Iterator["Future[list[Paused]]"]:
        """The engines stop, in a thread of its own, while the body measures weights that nobody writes."""
        pausing = in_thread(self._fleet.pause)
        try:
            yield pausing
        finally:
            wait_for([pausing])

    def _move(self, group: Group, model: Any, expected: Receipt) -> list[Received]:
        """Sends, while every engine receives."""
        timeout = self._config.timeout_seconds
        named = gathered(self._export(model))
        order = {"generation": group.seat.generation, "resume": self._fleet.is_one}
        with self._asked(
            lambda engine: engine.receive_broadcast(expected, **order, timeout_seconds=timeout),
            doing=f"the broadcast of version {expected.policy_version}",
        ) as answers:
            watch, deadline = partial(_raise_first_fault, answers), Deadline.after(timeout)
            try:
                self._sender.send(group, named, deadline=deadline, watch=watch)
                deadline.wait(lambda: all(a.done() for a in answers), doing="the engines' proof", watch=watch)
                return [answer.result() for answer in answers]
            except BaseException as error:
                self._leave(str(error))
                self._others.gather_along(named)
                raise

    def _connected(self, paused: Sequence[Paused]) -> Group:
        """A group of the engines that are there; a new one when an engine or a publish was lost."""
        if self._group is not None:
            generation = self._group.seat.generation
            if self._members == self._fleet.engines and all(one.generation == generation for one in paused):
                return self._group
            self._leave("an engine was lost or has restarted")
        return self._join()

    def _join(self) -> Group:
        """Connects with every worker of every engine. Raises `SyncError` unless all came up with the same plan."""
        timeout = self._config.timeout_seconds
        sizes = [member.world_size for member in self._fleet.each(lambda engine: engine.membership())]
        store, port = listen(self._host, timeout_seconds=timeout)
        invitation = Invitation(
            host=self._host,
            port=port,
            size=1 + sum(sizes),
            generation=uuid4().hex,
            bucket_bytes=self._config.bucket_bytes,
            sparse=self._config.sparse,
            device=device_name(self._device),
            manifest=self._manifest,
        )
        first_ranks = dict(zip(self._fleet.engines, accumulate(sizes, initial=1), strict=False))
        wire = invitation.to_wire()
        with self._asked(
            lambda engine: engine.join_broadcast(wire, first_rank=first_ranks[engine], timeout_seconds=timeout),
            doing=f"connecting with {len(sizes)} engines",
        ) as answers:
            watch, deadline = partial(_raise_first_fault, answers), Deadline.after(timeout)
            try:
                seat = invitation.seat(rank=0)
                self._group = Group.host(seat, self._device, store=store, deadline=deadline, watch=watch)
                self._members = self._fleet.engines
                if any(answer.result() != self._sender.plan.digest for answer in answers):
                    raise SyncError("an engine cuts the weights into other buckets; it runs another syncline")
            except BaseException as error:
                say_last(store, str(error))
                self._leave(str(error))
                raise
        return self._group

    def _leave(self, reason: str) -> None:
        if self._group is not None:
            self._closing.append(self._group.leave(reason))
            self._group = None

    @contextmanager
    def _asked(self, call: Callable[[EngineControl], Answer], *, doing: str) -> Iterator[list["Future[Answer]"]]:
        """Every engine's answer to come, while the body does the learner's part. A fault names every party's view."""
        answers = [in_thread(partial(call, engine)) for engine in self._fleet.engines]
        try:
            yield answers
        except SynclineError as error:
            wait_for(answers, timeout=LAST_WORDS_SECONDS)
            self._refuse_lost(answers)
            lines = [f"{doing} failed: {error}"]
            for engine, answer in zip(self._fleet.engines, answers, strict=True):
                fault = answer.exception() if answer.done() else "has not answered"
                lines += [f"{engine.name}: {fault}"] if fault else []
            raise SyncError("\n".join(lines)) from error

    def _refuse_lost(self, answers: Sequence["Future[Any]"]) -> None:
        """Raises `Lost` where that is why the others failed too: a collective call ends for all or for none."""
        silent = EngineError("has not answered")
        asked = zip(self._fleet.engines, answers, strict=True)
        faults = {engine: one.exception() if one.done() else silent for engine, one in asked}
        self._fleet.refuse_lost({engine: fault for engine, fault in faults.items() if fault})


def _raise_first_fault(answers: Sequence["Future[Any]"]) -> None:
    for answer in answers:
        if answer.done():
            answer.result()
