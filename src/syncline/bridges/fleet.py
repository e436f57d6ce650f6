"""The engines a bridge serves, asked all at once: what one of them must do, all must.

Who waits for whom: the caller waits until every engine has answered or missed its deadline. The first fault, in the
engines' order, is raised; the others have ended by then, so nothing goes on behind the caller's back. A learner of
several ranks asks from rank 0 alone; the others wait for what it was answered.

An engine is lost when it does not answer any more, not when its answer is wrong: a wrong digest stops the run. While
`bridge.min_engines` others are there, the publish begins anew with those, and every one of them proves it. What a lost
engine may still sample carries an older version that was proved. Before each publish the lost are asked again; one
that answers is checked as at the attach, and the publish is its own like the others': an engine that came up anew has
no version until then, and the pool samples nothing from it.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TypeVar

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.receipt import differences
from syncline.config.schema import Bridge
from syncline.errors import EngineError, EngineGone, EngineTimeout, SyncError
from syncline.protocols import EngineControl, Paused, Receipt, SyncReport

Answer = TypeVar("Answer")
PROBE_SECONDS = 5.0
"""For an engine whose answer was a fault to show that it is still there."""

log = logging.getLogger(__name__)


class Lost(EngineGone):
    """Engines that the fleet can do without do not answer any more; `engines` are their names."""

    engines: tuple[str, ...] = ()


class Fleet:
    """One engine or several. Every fault names its engine."""

    def __init__(self, engines: Sequence[EngineControl], config: Bridge, *, ranks: Ranks = ONE_RANK) -> None:
        if not engines:
            raise ValueError("a bridge needs an engine")
        self.engines = self.all = tuple(engines)
        """Those that are there; `all` are the lost ones too."""
        self._config = config
        self._timeout_seconds = config.timeout_seconds
        self._ranks = ranks
        self._threads = ThreadPoolExecutor(len(self.engines), thread_name_prefix="syncline-fleet")

    def close(self) -> None:
        self._threads.shutdown()

    def each(self, call: Callable[[EngineControl], Answer]) -> list[Answer]:
        """`call(engine)` for every engine at once; the answers in the engines' order, on every rank."""
        return self._ranks.from_first(lambda: self._each(call))

    def _each(self, call: Callable[[EngineControl], Answer]) -> list[Answer]:
        if len(self.engines) == 1:
            return [call(self.engines[0])]
        calls = [self._threads.submit(call, engine) for engine in self.engines]
        asked = zip(self.engines, calls, strict=True)
        faults = {engine: fault for engine, one in asked if (fault := one.exception()) is not None}
        self.refuse_lost(faults)
        for fault in faults.values():
            raise fault
        return [one.result() for one in calls]

    def refuse_lost(self, faults: Mapping[EngineControl, BaseException]) -> None:
        """Raises `Lost` where some of those with faults are lost and enough others are there."""
        lost = {engine: str(fault) for engine, fault in faults.items() if _is_gone(engine, fault)}
        if lost and len(lost) <= self._num_dispensable():
            error = Lost("\n".join(lost.values()))
            error.engines = tuple(engine.name for engine in lost)
            raise error

    def _num_dispensable(self) -> int:
        return len(self.engines) - (self._config.min_engines or len(self.all))

    def publishing(
        self, publish: Callable[[], SyncReport], *, admit: Callable[[EngineControl], None] = lambda engine: None
    ) -> SyncReport:
        """`publish()`, with the lost engines that are back; anew without those that are lost on the way.

        `admit(engine)` raises `SyncError` for an engine that came back as another. Whatever escapes leaves every engine
        paused.
        """
        with self.paused_on_failure():
            self._readmit(admit)
            while True:
                try:
                    report = publish()
                    return replace(report, num_engines=len(self.engines), num_lost=len(self.all) - len(self.engines))
                except Lost as lost:
                    self._drop(lost)

    def _drop(self, lost: Lost) -> None:
        kept = tuple(engine for engine in self.engines if engine.name not in lost.engines)
        log.warning(
            "lost %s; the run goes on with %d of %d engines: %s",
            ", ".join(lost.engines), len(kept), len(self.all), lost,
        )  # fmt: skip
        self.engines = kept

    def _readmit(self, admit: Callable[[EngineControl], None]) -> None:
        lost = [engine for engine in self.all if engine not in self.engines]
        if not lost:
            return

        def ask() -> dict[str, str | None]:
            asked = [(engine.name, self._threads.submit(_why_absent, engine, admit)) for engine in lost]
            return {name: answer.result() for name, answer in asked}

        told = self._ranks.from_first(ask)
        for name in [name for name, fault in told.items() if fault]:
            log.info("%s is not back: %s", name, told[name])
        self.engines = tuple(e for e in self.all if e in self.engines or told[e.name] is None)
        for name in [name for name, fault in told.items() if fault is None]:
            log.warning("%s is back, %d of %d engines", name, len(self.engines), len(self.all))

    def wait_until_ready(self) -> None:
        self.each(lambda engine: engine.wait_until_ready(timeout_seconds=self._timeout_seconds))

    def pause(self) -> list[Paused]:
        """As `bridge.in_flight` says."""
        order = {"mode": self._config.in_flight, "reuse_kv": self._config.frozen_kv == "reuse"}
        return self.each(lambda engine: engine.pause(**order, timeout_seconds=self._timeout_seconds))

    def receipts(self) -> list[Receipt]:
        return self.each(lambda engine: engine.receipt())

    @property
    def is_one(self) -> bool:
        """One engine may resume as soon as it has proved itself; several only when all have."""
        return len(self.engines) == 1

    def adopt(self, expected: Receipt, *, digests: Mapping[str, str]) -> None:
        """Every engine names what it holds, proves it, and samples from it."""
        self.proved(self.each(lambda e: e.adopt(expected, resume=self.is_one)), expected, digests=digests)

    def proved(self, held: Sequence[Receipt], expected: Receipt, *, digests: Mapping[str, str]) -> None:
        """As `prove`; then the engines sample, those that had to wait for the proof of all."""
        self.prove(held, expected, digests=digests)
        if not self.is_one:
            self.resume(expected)

    def resume(self, expected: Receipt) -> None:
        self.each(lambda engine: engine.resume(expected))

    @contextmanager
    def paused_on_failure(self) -> Iterator[None]:
        """Whatever escapes leaves every engine paused: nothing is sampled from a state nobody proved."""
        try:
            yield
        except BaseException:
            self.each(self._stop)
            raise

    def _stop(self, engine: EngineControl) -> None:
        """An engine that no longer answers samples nothing either."""
        with suppress(EngineError):
            engine.pause(mode="abort", timeout_seconds=self._timeout_seconds)

    def refuse_backwards(self, policy_version: int, receipts: Sequence[Receipt]) -> None:
        """Raises `SyncError` when an engine already serves a later version."""
        for engine, served in zip(self.engines, receipts, strict=True):
            if policy_version < served.policy_version:
                raise SyncError(
                    f"policy_version {policy_version} is older than {served.policy_version}, which engine "
                    f"{engine.name} already serves; versions only grow, so restart the engine to go back"
                )

    def refuse_other_model(self, learner: Mapping[str, str]) -> None:
        """`learner` is name → `dtype[shape]`. Raises `SyncError` naming what is missing, extra or of another kind."""
        self.each(lambda engine: refuse_other_model(engine, learner))

    def prove(self, held: Sequence[Receipt], expected: Receipt, *, digests: Mapping[str, str]) -> None:
        """Raises `SyncError` naming the parameters that differ, unless every engine holds what the learner computed."""
        for engine, receipt in zip(self.engines, held, strict=True):
            if receipt != expected:
                faults = "\n".join(differences(digests, engine.parameters()))
                version = f"version {receipt.policy_version}" if receipt.policy_version >= 0 else "no version,"
                raise SyncError(
                    f"{engine.name} holds {version} digest {receipt.digest[:12]} after "
                    f"a publish of version {expected.policy_version} digest {expected.digest[:12]}:\n{faults}"
                )


def refuse_other_model(engine: EngineControl, learner: Mapping[str, str]) -> None:
    served = {name: digest.partition(":")[0] for name, digest in engine.parameters().items()}
    if faults := differences(learner, served):
        lines = "\n".join(faults)
        raise SyncError(f"{engine.name} serves another model than the learner trains:\n{lines}")


def _is_gone(engine: EngineControl, fault: BaseException) -> bool:
    """A fault of an engine that still answers is the engine's; one that ends may have had time to tell of it."""
    if not isinstance(fault, EngineError) or isinstance(fault, EngineGone | EngineTimeout):
        return isinstance(fault, EngineGone | EngineTimeout)
    try:
        engine.wait_until_ready(timeout_seconds=PROBE_SECONDS)
    except (EngineGone, EngineTimeout):
        return True
    return False


def _why_absent(engine: EngineControl, admit: Callable[[EngineControl], None]) -> str | None:
    """Asks once. `None`: it is there, and what it was."""
    try:
        engine.wait_until_ready(timeout_seconds=0.0)
        admit(engine)
    except (EngineError, SyncError) as fault:
        return str(fault)
    return None
