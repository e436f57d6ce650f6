"""A core that is gone, one that hangs, and those that only take their time."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from syncline.engines.vllm import watch
from syncline.engines.vllm.gate import Gate
from syncline.engines.vllm.served import Served

PATIENCE = 60.0
yielded = asyncio.sleep


class Core:
    """Answers once it `answers`; `at` tells what becomes of it, by the second."""

    def __init__(self, at: dict[float, Callable[["Core"], object]]) -> None:
        self.errored, self.dead_error = False, "the core died of that"
        self.answers = asyncio.Event()
        self.num_probes = 0
        self.told = ""
        self._at = at
        self.served = Served(self, Gate(3), {})
        self.now = 0.0

    async def is_paused(self) -> bool:
        self.num_probes += 1
        await self.answers.wait()
        return False

    async def pass_time(self, seconds: float) -> None:
        self.now += seconds
        if event := self._at.get(self.now):
            event(self)
        for _ in range(4):
            await yielded(0)

    def begin(self) -> None:
        self.served.num_asked = 1

    def end(self) -> None:
        self.served.num_asked = 0

    def die(self) -> None:
        self.errored = True


def watched(
    monkeypatch: pytest.MonkeyPatch,
    at: dict[float, Callable[[Core], object]],
    *,
    hangs: bool,
    request_seconds: float = 2 * PATIENCE,
) -> Core:
    async def story() -> Core:
        core = Core(at)
        if not hangs:
            core.answers.set()
        monkeypatch.setattr(watch.asyncio, "sleep", core.pass_time)
        core.told = await watch.fault_of_core(core.served, request_seconds=request_seconds)
        return core

    return asyncio.run(story())


def test_a_core_that_hangs_is_told_by_its_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    core = watched(monkeypatch, {30.0: lambda core: core.answers.clear()}, hangs=False)
    assert core.told == "the engine core has not answered for 60 s"
    assert 30.0 + PATIENCE < core.now <= 30.0 + watch.PROBE_SECONDS + PATIENCE + 1


def test_a_core_that_died_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    core = watched(monkeypatch, {7.0: Core.die}, hangs=True)
    assert (core.told, core.now) == ("the core died of that", 7.0)


def test_a_core_that_answers_late_is_given_its_time_again(monkeypatch: pytest.MonkeyPatch) -> None:
    at = {59.0: lambda core: core.answers.set(), 61.0: lambda core: core.answers.clear(), 600.0: Core.die}
    at |= {120.0: lambda core: core.answers.set()}
    assert watched(monkeypatch, at, hangs=True).now == 600.0


def test_what_a_bridge_asked_of_the_workers_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    core = watched(monkeypatch, {50.0: Core.begin, 500.0: Core.end}, hangs=True)
    assert 500.0 + PATIENCE <= core.now <= 500.0 + PATIENCE + 1


def test_a_core_that_answers_is_not_asked_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched(monkeypatch, {100.0: Core.die}, hangs=False).num_probes <= 1 + 100 / watch.PROBE_SECONDS


@pytest.mark.parametrize(("request_seconds", "expected"), [(300, 150), (20, 60)])
def test_half_of_a_requests_time_is_anothers(
    monkeypatch: pytest.MonkeyPatch, request_seconds: float, expected: float
) -> None:
    core = watched(monkeypatch, {}, hangs=True, request_seconds=request_seconds)
    assert core.told == f"the engine core has not answered for {expected} s"
    assert expected < core.now <= expected + 1


def test_calls_of_the_ranks_are_counted_until_they_end() -> None:
    async def story() -> None:
        async def collective_rpc(method: str, args: tuple[object, ...]) -> list[dict[str, object]]:
            seen.append(served.num_asked)
            raise RuntimeError(method)

        seen: list[int] = []
        served = Served(SimpleNamespace(collective_rpc=collective_rpc), Gate(3), {})
        with pytest.raises(RuntimeError, match="load"):
            await served.each_rank("load")
        assert (seen, served.num_asked) == ([1], 0)

    asyncio.run(story())
