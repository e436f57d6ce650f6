"""A collection that finds all its attempts on disk samples nothing and scores them; others' are refused."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer

from syncline.config.offline_collect import Collect
from syncline.errors import ConfigError
from syncline.offline import collect as collecting
from syncline.offline.collect import ATTEMPTS_FILE, ROLLOUTS_FILE, Place, collect, model_held
from syncline.offline.questions import load_questions
from syncline.offline.work import WorkItem, Workload
from syncline.types import Completion, FinishReason, SamplingParams

ROW = {"question": "a farm has 48 hens and sells half of them, how many are left", "answer": "<<48/2=24>>24\n#### 24"}
SOUND, WRONG = "48/2=24 #### 24", "48/2=25 #### 25"


@pytest.fixture(autouse=True)
def character_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "load_tokenizer", lambda path: CharacterTokenizer())


def asked(folder: Path, **fields: Any) -> Collect:
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    values = {"questions": {"path": str(folder / "rows.jsonl")}, "num_samples": 1, "num_twins": 1, **fields}
    return Collect.model_validate(values)


def place(folder: Path, **fields: Any) -> Place:
    values: dict[str, Any] = {"max_length": 400, "timeout_seconds": 1, "slots": 4, **fields}
    return Place(folder, ("http://127.0.0.1:9",), "characters", **values)


def attempt(item: WorkItem, text: str, **fields: Any) -> dict[str, Any]:
    return {
        "key": item.key, "question_id": item.question_id, "question": item.question, "gold": item.gold,
        "arm": item.arm.name, "sample": item.sample, "seed": item.seed,
        "prompt": [{"role": "user", "content": item.prompt[0].content}], "text": text,
        "token_ids": [1, 2], "logprobs": [-0.5, -0.25], "num_tokens": 2, "num_prompt_tokens": 9,
        "finish_reason": "stop", "model": "digest-a",
    } | fields  # fmt: skip


def fill(folder: Path, collect_asked: Collect, **fields: Any) -> list[WorkItem]:
    loaded = load_questions(collect_asked.questions, seed=0, heldout=False)
    items = Workload(loaded.questions, collect_asked, seed=0).first()
    texts = {"solve": SOUND, "solve@cf": "50/2=25 #### 25", "rephrase": WRONG, "rephrase@cf": WRONG}
    rows = [attempt(item, texts[item.arm.name], **fields) for item in reversed(items)]
    (folder / ATTEMPTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return items


def test_what_is_there_is_scored_and_nothing_is_sampled(tmp_path: Path) -> None:
    items = fill(tmp_path, asked(tmp_path))
    told: list[str] = []
    facts = collect(asked(tmp_path), place(tmp_path), model="digest-a", seed=0, show=told.append)
    assert (facts["resumed"], facts["sampled"], facts["trajectories"]) == (4, 0, 4)
    assert (facts["tokens"], facts["total_tokens"]) == (0, 8)
    rows = [json.loads(line) for line in (tmp_path / ROLLOUTS_FILE).read_text().splitlines()]
    order = ["solve", "rephrase", "solve@cf", "rephrase@cf"]
    assert [row["arm"] for row in rows] == order and {row["key"] for row in rows} == {item.key for item in items}
    assert [(row["answer"], row["correct"]) for row in rows] == [
        ("24", True), ("25", False), ("25", True), ("25", True),
    ]  # fmt: skip
    assert rows[0]["scores"] == {
        "agreement": 0.0, "steps": 1.0, "paraphrase": 0.0, "counterfactual": 1.0,
        "coherence": pytest.approx(0.55), "reward": pytest.approx(1.275),
    }  # fmt: skip
    assert rows[2]["gold"] == "25" and "50 hens" in rows[2]["question"] and rows[2]["scores"] == {"reward": 1.0}
    assert told[-1].startswith("collected 4/4")


class TogetherReplica:
    """Answers nobody before eight are asked for; `asked_of` counts them by engine."""

    asked_of: Counter[str]
    all_asked: asyncio.Event

    def __init__(self, url: str, **options: Any) -> None:
        self.name = url

    async def __aenter__(self) -> "TogetherReplica":
        return self

    async def __aexit__(self, *exc_info: object) -> None: ...

    async def digest(self) -> str:
        return "digest-a"

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        self.asked_of[self.name] += 1
        if self.asked_of.total() == 8:
            self.all_asked.set()
        await self.all_asked.wait()
        return Completion((1,), (-0.5,), (), FinishReason.STOP)


def test_a_collection_below_the_engines_slots_is_spread_over_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TogetherReplica, "asked_of", Counter(), raising=False)
    monkeypatch.setattr(TogetherReplica, "all_asked", asyncio.Event(), raising=False)
    monkeypatch.setattr(collecting, "EngineReplica", TogetherReplica)
    two = replace(place(tmp_path, slots=8), engine_urls=("http://a", "http://b"))
    little = asked(tmp_path, num_samples=8, num_twins=0, rephrase=False)
    facts = collect(little, two, model="digest-a", seed=0, show=lambda line: None)
    assert facts["sampled"] == 8
    assert TogetherReplica.asked_of == {"http://a": 4, "http://b": 4}


@pytest.mark.parametrize(
    ("fields", "model", "seed", "said"),
    [
        ({"model": "digest-b"}, "digest-a", 0, "was sampled from digest-b, and the engines hold digest-a"),
        ({"key": "abc/solve/7"}, "digest-a", 0, "is there twice"),
    ],
)
def test_attempts_of_another_collection_are_refused(
    tmp_path: Path, fields: dict[str, Any], model: str, seed: int, said: str
) -> None:
    fill(tmp_path, asked(tmp_path), **fields)
    with pytest.raises(ConfigError, match=said):
        collect(asked(tmp_path), place(tmp_path), model=model, seed=seed, show=lambda line: None)
    assert not (tmp_path / ROLLOUTS_FILE).exists()


def test_attempts_that_are_no_work_of_this_configuration_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, asked(tmp_path))
    fewer = asked(tmp_path, rephrase=False)
    with pytest.raises(ConfigError, match=r"2 attempts are of no work item .* such as \w+/rephrase"):
        collect(fewer, place(tmp_path), model="digest-a", seed=0, show=lambda line: None)


def test_a_question_without_room_is_named_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.max_length: 50, but question \w+ \('a farm has 48"):
        collect(asked(tmp_path), place(tmp_path, max_length=50), model="d", seed=0, show=lambda line: None)


def test_engines_of_different_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        def __init__(self, url: str, **options: Any) -> None:
            self.url = url

        async def __aenter__(self) -> "Held":
            return self

        async def __aexit__(self, *exc_info: object) -> None:
            pass

        async def digest(self) -> str:
            return f"digest of {self.url}"

    monkeypatch.setattr(collecting, "EngineReplica", Held)
    assert asyncio.run(model_held(["a"], adapter=None, timeout_seconds=1)) == "digest of a"
    with pytest.raises(ConfigError, match="the engines hold different weights: a holds digest of a, b holds"):
        asyncio.run(model_held(["a", "b"], adapter=None, timeout_seconds=1))
