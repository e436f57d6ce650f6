"""The pool: requests go where the fewest tokens are to come, and elsewhere when an engine does not answer."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from syncline.engines import pool as pool_module
from syncline.engines.client import AtGate, EngineClient, NotReady
from syncline.engines.pool import EnginePool
from syncline.errors import EngineError, EngineGone, EngineTimeout
from syncline.types import Completion, FinishReason, SamplingParams

SAMPLING = SamplingParams(100)


def completion(length: int) -> Completion:
    return Completion((7,) * length, (-1.0,) * length, (), FinishReason.STOP)


class Engine(EngineClient):
    """Answers when told to; `faults` are raised first, one a request."""

    def __init__(self, url: str, *faults: EngineError) -> None:
        super().__init__(url, timeout_seconds=1)
        self.prompts: list[int] = []
        self.faults = list(faults)
        self.answer = asyncio.Event()
        self.length = 100

    async def attempt(self, prompt_token_ids, sampling, *, num_completions=1, images=(), needs_version=False):
        assert needs_version, "training takes published policies alone"
        self.prompts.append(len(prompt_token_ids))
        if self.faults:
            raise self.faults.pop(0)
        await self.answer.wait()
        return [completion(self.length)] * num_completions


def pool_of(*engines: Engine, timeout_seconds: float = 5.0) -> EnginePool:
    pool = EnginePool([], timeout_seconds=timeout_seconds)
    pool._clients, pool._tokens = list(engines), dict.fromkeys(engines, 0.0)
    return pool


async def asked(pool: EnginePool, *requests: tuple[int, int]) -> list[asyncio.Task]:
    """Each `(prompt length, num_completions)`, started in order."""
    running = []
    for length, num_completions in requests:
        prompt = (5,) * length
        running.append(asyncio.create_task(pool.generate(prompt, SAMPLING, num_completions=num_completions)))
        await asyncio.sleep(0)
    return running


def play(scenario: Callable[[], object]) -> object:
    return asyncio.run(scenario())  # type: ignore[arg-type]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def pass_time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The pool's time, which its sleeps let pass."""

    async def sleep(seconds: float) -> None:
        clock.now += seconds
        await real(0)

    clock, real = Clock(), asyncio.sleep
    monkeypatch.setattr(pool_module, "time", clock)
    monkeypatch.setattr(pool_module.asyncio, "sleep", sleep)
    return clock


def test_each_request_goes_to_the_engine_with_the_fewest_tokens_to_come() -> None:
    async def scenario() -> tuple[Sequence[int], Sequence[int]]:
        first, second = Engine("http://a"), Engine("http://b")
        pool = pool_of(first, second)
        running = await asked(pool, (1, 4), (2, 1), (350, 1), (3, 1), (4, 1))  # 401 | 102, 552 | 504, 608
        first.answer.set()
        second.answer.set()
        await asyncio.gather(*running)
        assert set(pool._tokens.values()) == {0.0}
        return first.prompts, second.prompts

    assert play(scenario) == ([1, 3, 4], [2, 350])


def test_what_was_answered_tells_how_long_completions_are() -> None:
    async def scenario() -> Sequence[int]:
        first, second = Engine("http://a"), Engine("http://b")
        pool = pool_of(first, second)
        first.length = 10
        first.answer.set()
        await asyncio.gather(*await asked(pool, (1, 1)))
        first.answer.clear()
        running = await asked(pool, (1, 4), (80, 1))  # 4 completions of 10, not of 100
        await asked(pool, (2, 1))
        for task in running:
            task.cancel()
        return first.prompts

    assert play(scenario) == [1, 1, 2]


@pytest.mark.parametrize("fault", [NotReady("it starts"), EngineGone("it broke off")])
def test_an_engine_that_did_not_answer_rests_and_another_takes_the_request(fault: EngineError) -> None:
    async def scenario() -> tuple[Sequence[int], Sequence[int]]:
        first, second = Engine("http://a", fault), Engine("http://b")
        first.answer.set()
        second.answer.set()
        pool = pool_of(first, second)
        for length in (1, 2):
            [task] = await asked(pool, (length, 1))
            assert len((await task)[0].token_ids) == 100
        pool._resting[first] = (0.0, fault)  # its rest is over
        [task] = await asked(pool, (3, 1))
        await task
        assert not pool._resting
        return first.prompts, second.prompts

    assert play(scenario) == ([1, 3], [1, 2])


class Closed(Engine):
    """Keeps requests at its gate, until told to send them on."""

    async def attempt(self, *args, **options):
        await asyncio.wait([asyncio.create_task(event.wait()) for event in (self.answer, self.sent_on)],
                           return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        self.faults = [] if self.answer.is_set() else [AtGate(f"{self.url} is paused")]
        return await super().attempt(*args, **options)

    sent_on = asyncio.Event()


def test_of_a_paused_engine_one_request_asks_while_the_others_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(engine: Engine) -> float:
        return pool._tokens[engine]

    async def scenario() -> None:
        running = await asked(pool, (1, 1), (1, 1), (1, 1))
        assert (waiting(closed), waiting(other)) == (202, 101)
        closed.sent_on.set()
        await settled()
        assert (waiting(closed), waiting(other)) == (0, 303)
        closed.sent_on.clear()
        running += await asked(pool, (1, 1), (1, 1))
        assert (waiting(closed), waiting(other)) == (0, 505), "it rests"
        clock.now += pool_module.GATE_REST_SECONDS
        running += await asked(pool, (1, 1), (1, 1), (1, 1))
        assert (waiting(closed), waiting(other)) == (101, 707), "one asks whether it samples"
        closed.answer.set()
        await settled()
        running += await asked(pool, (1, 1))
        assert waiting(other) == 707, "it does"
        other.answer.set()
        await asyncio.gather(*running)

    closed, other = Closed("http://a"), Engine("http://b")
    pool = pool_of(closed, other, timeout_seconds=60.0)
    clock = pass_time(monkeypatch)
    play(scenario)


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_while_every_engine_is_paused_requests_wait_at_their_gates_until_they_may_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A publish that takes longer than the gates keep a request."""

    async def scenario() -> None:
        engines = [Engine(f"http://{name}", *[AtGate(f"{name} is paused")] * 3) for name in "ab"]
        pool = pool_of(*engines, timeout_seconds=60.0)
        running = await asked(pool, *[(1, 1)] * 6)
        await settled()
        assert [pool._tokens[engine] for engine in engines] == [303.0, 303.0], "all inside, spread evenly"
        assert clock.now == 0.0, "nobody waited where nothing could be sampled"
        for engine in engines:
            engine.answer.set()
        assert [len(found) for found in await asyncio.gather(*running)] == [1] * 6

    clock = pass_time(monkeypatch)
    play(scenario)


def test_an_engine_that_let_a_request_wait_in_vain_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hung(Engine):
        async def attempt(self, *args, **options):
            clock.now += 5.1
            return await super().attempt(*args, **options)

    async def scenario() -> None:
        first, second = Hung("http://a", EngineTimeout("a did not answer")), Engine("http://b")
        second.answer.set()
        pool = pool_of(first, second)
        [task] = await asked(pool, (1, 1))
        with pytest.raises(EngineTimeout, match=r"no engine answered the request in 5 s:\na did not answer"):
            await task
        await asyncio.gather(*await asked(pool, (2, 1)))
        assert (first.prompts, second.prompts) == ([1], [2])

    clock = pass_time(monkeypatch)
    play(scenario)


def test_an_answer_that_is_a_refusal_is_no_reason_to_ask_another() -> None:
    async def scenario() -> Sequence[int]:
        first, second = Engine("http://a", EngineError("too long")), Engine("http://b")
        [task] = await asked(pool_of(first, second), (1, 1))
        with pytest.raises(EngineError, match="too long"):
            await task
        return second.prompts

    assert play(scenario) == []


def test_the_only_engine_that_broke_off_is_not_waited_for() -> None:
    async def scenario() -> None:
        [task] = await asked(pool_of(Engine("http://a", EngineGone("it broke off"))), (1, 1))
        with pytest.raises(EngineGone):
            await task

    play(scenario)


def test_no_engine_at_all_is_told_with_what_each_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        first, second = Engine("http://a", NotReady("a starts")), Engine("http://b", EngineGone("b broke off"))
        [task] = await asked(pool_of(first, second, timeout_seconds=0.5), (1, 1))
        with pytest.raises(EngineTimeout, match=r"no engine answered the request in 0.5 s:\na starts\nb broke off"):
            await task

    pass_time(monkeypatch)
    play(scenario)


def test_attempts_that_take_their_time_to_break_off_end_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing(Engine):
        """Crashes, comes back, crashes ..."""

        async def attempt(self, *args, **options):
            clock.now += pool_module.REST_SECONDS + 0.1
            return await super().attempt(*args, **options)

    async def scenario() -> int:
        first, second = (Crashing(url, *(EngineGone(f"{url} crashed") for _ in range(9))) for url in ("a", "b"))
        first.answer.set()
        second.answer.set()
        [task] = await asked(pool_of(first, second, timeout_seconds=4.0), (1, 1))
        with pytest.raises(EngineTimeout, match=r"in 4 s:\na crashed\nb crashed"):
            await task
        return len(first.prompts + second.prompts)

    clock = pass_time(monkeypatch)
    assert play(scenario) == 4
