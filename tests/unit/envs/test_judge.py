"""Verdicts over real HTTP messages (a transport in place of the network): read, tried again, or none, never a 0."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.judge import Endpoint, Judge, NoVerdict
from syncline.envs.rendering import ChatPolicy
from syncline.envs.tasks.judged import Judged
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate
from syncline.types import Rollout, RolloutStatus, SamplingParams

URL = "http://judge.test/v1"


def says(text: str) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"role": "assistant", "content": text}}]})


class Bench:
    """A judge whose endpoint is `respond(prompt)`; `waits` are the seconds it slept between tries."""

    def __init__(self, respond: Callable[[str], httpx.Response], **endpoint: Any) -> None:
        self.asked: list[httpx.Request] = []
        self.waits: list[float] = []
        self._respond = respond
        self.endpoint = Endpoint(URL, "wise", **endpoint)

    def open(self) -> Judge:
        return Judge(self.endpoint, rubric="Be strict.", transport=httpx.MockTransport(self._handle), sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        return self._respond(json.loads(request.content)["messages"][0]["content"])

    def grade(self) -> float:
        async def ask() -> float:
            async with self.open() as judge:
                return await judge.grade("say hi", "hi")

        return asyncio.run(ask())


def test_grade_is_read_off_the_last_score_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    bench = Bench(lambda prompt: says("Score: 1 would be harsh.\nScore: 7.5"), api_key_env="JUDGE_KEY")
    assert bench.grade() == 0.75
    [request] = bench.asked
    assert (str(request.url), request.headers["authorization"]) == (f"{URL}/chat/completions", "Bearer sesame")
    assert all(part in request.content.decode() for part in ("say hi", "Be strict.", '"model":"wise"'))


def test_what_may_pass_is_tried_again_ever_later():
    answers = iter([httpx.Response(500), httpx.Response(429), says("I like it"), says("Score: 10")])
    bench = Bench(lambda prompt: next(answers))
    assert bench.grade() == 1.0
    assert bench.waits == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("answer", "num_asked", "words"),
    [
        (lambda p: httpx.Response(503, text="busy"), 4, "503: busy"),
        (lambda p: says("Score: 11"), 4, "no `Score: N` from 0 to 10"),
        (lambda p: says(""), 4, "no `Score: N`"),
        (lambda p: httpx.Response(401, text="who are you"), 1, "answered 401: who are you"),
        (lambda p: httpx.Response(200, text="<html>"), 1, "does not speak OpenAI's chat"),
        (lambda p: httpx.Response(200, json={"choices": []}), 1, "does not speak OpenAI's chat"),
    ],
)
def test_no_verdict_says_who_and_why(answer: Callable[[str], httpx.Response], num_asked: int, words: str):
    bench = Bench(answer)
    with pytest.raises(NoVerdict, match=words):
        bench.grade()
    assert len(bench.asked) == num_asked


def test_connection_refused_and_deadline_are_no_verdict():
    def refuse(prompt: str) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(NoVerdict, match=r"judge 'wise' at http://judge\.test/v1 gave no verdict: ConnectError"):
        Bench(refuse).grade()

    async def never() -> None:
        await asyncio.Event().wait()

    bench = Bench(lambda prompt: httpx.Response(500), timeout_seconds=0.05)
    bench._sleep = lambda seconds: never()  # type: ignore[method-assign]
    with pytest.raises(NoVerdict, match=r"500.*and 0\.05 s are over"):
        bench.grade()


def judged(tmp_path: Path, bench: Bench, *answers: str, **args: Any) -> list[Rollout]:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "say hi", "reference": "hello"}\n')
    environment = Judged(judge={"url": URL, "model": "wise"}, path=str(file), **args)
    environment.open_judge = bench.open
    generate = FakeGenerate(lambda prompt, sampling, i: completion(answers[i]))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=9), max_length=99)
    return asyncio.run(environment.rollouts(environment.task(0), len(answers), policy))


def test_failed_judge_is_an_error_status_of_that_attempt_alone(tmp_path: Path):
    bench = Bench(lambda prompt: says("Score: 5") if "# Answer\nhi" in prompt else httpx.Response(500))
    good, bad = judged(tmp_path, bench, "hi", "go away")
    assert (good.reward, good.reward_parts) == (0.5, {"grade": 0.5})
    assert (bad.status, bad.reward) == (RolloutStatus.ERROR, None)
    assert "gave no verdict" in (bad.error or "")
    assert "# A good answer\nhello" in json.loads(bench.asked[0].content)["messages"][0]["content"]


def longer(prompt: str) -> httpx.Response:
    first, second = prompt.split("# Answer A\n")[1].split("\n\nSay briefly")[0].split("\n\n# Answer B\n")
    return says("Better: " + ("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"))


def test_preference_is_the_share_of_siblings_beaten(tmp_path: Path):
    rollouts = judged(tmp_path, Bench(longer), "a", "bbb", "cc", "dd", mode="preference", num_opponents=3)
    assert [r.reward for r in rollouts] == pytest.approx([0.0, 1.0, 0.5, 0.5])


def test_judge_that_always_takes_the_first_prefers_nobody(tmp_path: Path):
    rollouts = judged(tmp_path, Bench(lambda prompt: says("Better: A")), "a", "bbb", mode="preference")
    assert [r.reward for r in rollouts] == [0.5, 0.5]


def test_single_attempt_has_nothing_to_be_compared_with(tmp_path: Path):
    [rollout] = judged(tmp_path, Bench(longer), "a", mode="preference")
    assert (rollout.reward, rollout.status) == (None, RolloutStatus.ERROR)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"judge": {"url": "judge:1", "model": "m"}}, "judge.url: 'judge:1' must begin with http"),
        ({"judge": {"url": URL}}, "judge: .*missing.*'model'"),
        ({"judge": {"url": URL, "model": "m", "api_key_env": "NO_SUCH_KEY"}}, "judge.api_key_env: .*NO_SUCH_KEY"),
        ({"judge": {"url": URL, "model": "m", "timeout_seconds": 0}}, "timeout_seconds > 0"),
        ({"judge": {"url": URL, "model": "m"}, "mode": "vibes"}, "mode: 'vibes' is not one of grade, preference"),
        ({"judge": {"url": URL, "model": "m"}}, "path: missing"),
    ],
)
def test_unusable_arguments_are_refused_by_name(args: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Judged(**args)
