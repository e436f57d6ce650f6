"""Engines that die, come back, answer wrongly or hold other weights: every item ends up on disk once, or the run says
why not. The engines are fakes that a test breaks; the files are real."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from character_tokenizer import completion

from syncline.errors import EngineError, SyncError
from syncline.offline.arms import Arm
from syncline.offline.lines import AppendOnlyLines, read_records
from syncline.offline.records import Attempt, Said
from syncline.offline.replica import Gone
from syncline.offline.sampler import Request, Sampler
from syncline.offline.work import WorkItem
from syncline.types import Completion, SamplingParams

MODEL = "digest-of-the-model"
ARM = Arm("solve", "{question}", 1.0, 1.0)


class FakeReplica:
    """Answers each request after a turn of the event loop; `fault` is asked before every answer."""

    def __init__(self, name: str, *, fault: Callable[["FakeReplica"], Exception | None] = lambda own: None) -> None:
        self.name = name
        self.held = MODEL
        self.alive = True
        self.served = 0
        self._fault = fault

    async def digest(self) -> str:
        await asyncio.sleep(0)
        if not self.alive:
            raise Gone(f"nobody listens at {self.name}")
        return self.held

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        await asyncio.sleep(0.001)
        if (fault := self._fault(self)) is not None:
            raise fault
        self.served += 1
        return completion("".join(map(chr, prompt_token_ids)))


def request(number: int) -> Request:
    item = WorkItem(f"q{number}", f"{number}", "7", ARM, 0, 0)
    return Request(item, tuple(map(ord, str(number))), SamplingParams(8))


def attempt(asked: Request, said: Completion) -> Attempt:
    item, text = asked.item, "".join(map(chr, said.token_ids))
    return Attempt(
        key=item.key, question_id=item.question_id, question=item.question, gold="7", arm="solve", sample=0, seed=1,
        prompt=(Said(role="user", content=item.question),), text=text, token_ids=said.token_ids,
        logprobs=said.logprobs, num_tokens=len(text), num_prompt_tokens=1, finish_reason="stop", model=MODEL,
    )  # fmt: skip


def run(
    path: Path, replicas: Sequence[FakeReplica], requests: Sequence[Request], *, more: Sequence[Request] = ()
) -> Sampler:
    """`more` is due when the first item is written."""
    due = list(more)

    def on_written(asked: Request, told: Attempt) -> list[Request]:
        assert told.key in path.read_text(), "told of before it was on disk"
        given, due[:] = due[:], []
        return given

    async def sample() -> Sampler:
        with AppendOnlyLines(path, key="key") as lines:
            sampler = Sampler(
                replicas, lines, model=MODEL, record=attempt, on_written=on_written,
                concurrency=4, lost_after_seconds=0.05, poll_seconds=0.002,
            )  # fmt: skip
            async with asyncio.timeout(20):
                await sampler.run(requests)
            return sampler

    return asyncio.run(sample())


def texts(path: Path) -> list[str]:
    return sorted(record["text"] for _, record in read_records(path))


def test_everything_is_sampled_by_all_engines_and_what_that_makes_due(tmp_path: Path) -> None:
    replicas = [FakeReplica("a"), FakeReplica("b")]
    sampler = run(tmp_path / "x.jsonl", replicas, [request(n) for n in range(40)], more=[request(99)])
    assert texts(tmp_path / "x.jsonl") == sorted(map(str, [*range(40), 99]))
    assert (sampler.tally.done, sampler.tally.total, sampler.tally.given_back) == (41, 41, 0)
    assert sampler.tally.tokens == 10 + 30 * 2 + 2 and sampler.tally.finish_reasons == {"stop": 41}
    assert replicas[0].served > 5 and replicas[1].served > 5


def dies_after(number: int) -> Callable[[FakeReplica], Exception | None]:
    def fault(own: FakeReplica) -> Exception | None:
        if own.served >= number:
            own.alive = False
            return EngineError(f"{own.name} broke off")
        return None

    return fault


def test_a_dead_engines_items_are_sampled_elsewhere(tmp_path: Path) -> None:
    dead = FakeReplica("dead", fault=dies_after(3))
    sampler = run(tmp_path / "x.jsonl", [dead, FakeReplica("b")], [request(n) for n in range(300)])
    assert texts(tmp_path / "x.jsonl") == sorted(map(str, range(300)))
    assert dead.served == 3 and sampler.tally.given_back >= 1
    assert sampler.tally.lost == {"dead": "nobody listens at dead"}


def test_without_an_engine_the_run_ends_and_what_was_sampled_stays(tmp_path: Path) -> None:
    dying = [FakeReplica("a", fault=dies_after(5)), FakeReplica("b", fault=dies_after(5))]
    with pytest.raises(EngineError, match=r"no engine is left, \d+ items are not done(.|\n)*nobody listens at b"):
        run(tmp_path / "x.jsonl", dying, [request(n) for n in range(40)])
    assert len(texts(tmp_path / "x.jsonl")) == 10


def test_an_engine_named_twice_is_one_that_dies(tmp_path: Path) -> None:
    own = [FakeReplica("a", fault=dies_after(5)) for _ in range(2)]
    with pytest.raises(EngineError, match="no engine is left"):
        run(tmp_path / "x.jsonl", own, [request(n) for n in range(40)])


def test_an_engine_that_comes_back_goes_on(tmp_path: Path) -> None:
    faults = [EngineError("a hiccup")]
    own = FakeReplica("a", fault=lambda own: faults.pop() if own.served == 5 and faults else None)
    sampler = run(tmp_path / "x.jsonl", [own], [request(n) for n in range(20)])
    assert len(texts(tmp_path / "x.jsonl")) == 20 and sampler.tally.given_back >= 1 and not sampler.tally.lost


def test_an_item_that_living_engines_refuse_is_named(tmp_path: Path) -> None:
    own = FakeReplica("a", fault=lambda own: EngineError("no such token"))
    with pytest.raises(EngineError, match=r"q\d/solve/0: failed 3 times on engines that live: no such token"):
        run(tmp_path / "x.jsonl", [own], [request(n) for n in range(3)])


def test_other_weights_are_never_mixed_in(tmp_path: Path) -> None:
    def swap(own: FakeReplica) -> None:
        if own.served == 4:
            own.held = "other"

    with pytest.raises(SyncError, match="holds the weights other, and these rollouts are of digest-of-th"):
        run(tmp_path / "x.jsonl", [FakeReplica("a", fault=swap)], [request(n) for n in range(4000)])
