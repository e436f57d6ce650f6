"""The engines a bridge serves, asked all at once: what one of them must do, all must.

Who waits for whom: the caller waits until every engine has answered or missed its deadline. The first fault, in the
engines' order, is raised; the others have ended by then, so nothing goes on behind the caller's back. A learner of
several ranks asks from rank 0 alone; the others wait for what it was answered.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.receipt import differences
from syncline.config.schema import Bridge
from syncline.errors import EngineError, SyncError
from syncline.protocols import EngineControl, Paused, Receipt

Answer = TypeVar("Answer")


class Fleet:
    """One engine or several. Every fault names its engine."""

    def __init__(self, engines: Sequence[EngineControl], config: Bridge, *, ranks: Ranks = ONE_RANK) -> None:
        if not engines:
            raise ValueError("a bridge needs an engine")
        self.engines = tuple(engines)
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
        faults = [fault for fault in (one.exception() for one in calls) if fault is not None]
        if faults:
            raise faults[0]
        return [one.result() for one in calls]

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
        for engine, parameters in zip(self.engines, self.each(lambda engine: engine.parameters()), strict=True):
            served = {name: digest.partition(":")[0] for name, digest in parameters.items()}
            if faults := differences(learner, served):
                lines = "\n".join(faults)
                raise SyncError(f"{engine.name} serves another model than the learner trains:\n{lines}")

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
