"""Evaluation on sets of questions: greedy answers, and samples for what holds at k, on disk one by one.

Answers are sampled as a collection's are (`sampler.py`: any number of engines, a dead one's work done again), into
`answers-<set>.jsonl`; `evaluation.json` is worked out from the files and names the weights by their digest.
A file of other weights is refused, so a number never outlives its model.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

from syncline.config.offline import Eval
from syncline.config.offline_collect import Questions
from syncline.envs.rendering import load_tokenizer
from syncline.errors import ConfigError
from syncline.observe.files import read_object, write_atomically
from syncline.offline.arms import Arm
from syncline.offline.collect import Place, attempt_of, prompt_tokens, request_of
from syncline.offline.gauge import Gauge, gauging
from syncline.offline.lines import AppendOnlyLines
from syncline.offline.marks import GREEDY, SAMPLED, Marked, read_answer, summarise
from syncline.offline.questions import Question, load_questions
from syncline.offline.records import Attempt, read_trajectories
from syncline.offline.replica import EngineReplica, allow_connections
from syncline.offline.sampler import Request, Sampler
from syncline.offline.work import WorkItem

EVALUATION_FILE = "evaluation.json"
SHOW_SECONDS = 10.0


def answers_file(own: Questions) -> str:
    return f"answers-{own.name}.jsonl"


def assess(
    asked: Eval, place: Place, *, model: str, seed: int, show: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Writes the answers of each set and `evaluation.json`, which it returns. Answers that are there are not asked
    again. Raises `ConfigError` for answers of other weights than `model`, `EngineError` when no engine is left."""
    tokenizer = load_tokenizer(place.tokenizer)
    sets: dict[str, Any] = {}
    tokens = 0
    for own in asked.sets:
        questions = load_questions(own, seed=seed, heldout=True)
        one = _Set(asked, place, tokenizer=tokenizer, model=model)
        requests = [request for question in questions.questions for request in one.requests(question, seed)]
        with AppendOnlyLines(place.folder / answers_file(own), key="key") as lines:
            _refuse_foreign(lines, requests, model=model)
            pending = [request for request in requests if request.item.key not in lines.done]
            asyncio.run(one.sample(pending, lines, lambda line, name=own.name: show(f"{name}: {line}")))
        marks = list(_marked(asked, place.folder, own, questions.questions))
        tokens += sum(one.num_tokens for one in marks)
        sets[own.name] = summarise(marks) | {"num_duplicates_left_out": questions.num_duplicates}
    found = {"model": model, "tokens": tokens, "sets": sets}
    write_atomically(place.folder / EVALUATION_FILE, json.dumps(found, indent=2) + "\n")
    return found


def read_marks(asked: Eval, folder: Path, own: Questions, *, seed: int) -> list[Marked]:
    """The answers of a finished evaluation, marked as `asked` says. Raises `ConfigError` for a folder that has none."""
    if read_object(folder / EVALUATION_FILE) is None:
        raise ConfigError([f"{folder}: holds no {EVALUATION_FILE}; give the folder of a finished evaluation"])
    return list(_marked(asked, folder, own, load_questions(own, seed=seed, heldout=True).questions))


class _Set:
    def __init__(self, asked: Eval, place: Place, *, tokenizer: Any, model: str) -> None:
        self._asked, self._place, self._tokenizer, self._model = asked, place, tokenizer, model
        self._greedy = Arm(GREEDY, asked.prompt, 0.0, 1.0)
        self._sampled = Arm(SAMPLED, asked.prompt, asked.temperature, asked.top_p, num_samples=asked.num_samples)

    def requests(self, question: Question, seed: int) -> Iterator[Request]:
        arms = [self._greedy] + [self._sampled] * (self._asked.num_samples > 0)
        ids = prompt_tokens(self._tokenizer, self._greedy.prompt(question.question))
        for arm in arms:
            for sample in range(arm.num_samples):
                item = WorkItem(question.question_id, question.question, question.gold, arm, sample, seed)
                yield request_of(item, ids, max_tokens=self._asked.max_tokens, max_length=self._place.max_length)

    async def sample(self, pending: list[Request], lines: AppendOnlyLines, show: Callable[[str], None]) -> None:
        asked, place = self._asked, self._place
        concurrency = min(asked.concurrency, -(-len(pending) // len(place.engine_urls)) or 1)
        allow_connections(concurrency * len(place.engine_urls), field="eval.concurrency")
        async with AsyncExitStack() as stack:
            replicas = [
                await stack.enter_async_context(
                    EngineReplica(url, timeout_seconds=place.timeout_seconds, max_connections=concurrency)
                )
                for url in place.engine_urls
            ]
            sampler = Sampler(
                replicas,
                lines,
                model=self._model,
                record=partial(attempt_of, tokenizer=self._tokenizer, model=self._model),
                on_written=lambda request, attempt: (),
                concurrency=concurrency,
                lost_after_seconds=asked.lost_after_seconds,
            )
            gauge = Gauge(sampler.tally, done_before=len(lines.done), slots=place.slots)
            async with gauging(gauge, show, gpus=place.gpus, show_seconds=SHOW_SECONDS):
                await sampler.run(pending)


def _refuse_foreign(lines: AppendOnlyLines, requests: list[Request], *, model: str) -> None:
    keys = {request.item.key for request in requests}
    for one in read_trajectories(lines.path, Attempt) if lines.done else ():
        if one.model != model:
            whose = f"was answered by {one.model[:12]}, and {model[:12]} is evaluated"
            raise ConfigError([f"{lines.path}: {whose}; evaluate into another folder, or remove it"])
        if one.key not in keys:
            raise ConfigError([f"{lines.path}: {one.key} is no question of this set; evaluate into another folder"])


def _marked(asked: Eval, folder: Path, own: Questions, questions: tuple[Question, ...]) -> Iterator[Marked]:
    """In the order of questions, arms and samples: answers lie in the file as they ended. A baseline's may be to other
    questions too; those come last."""
    known = {question.question_id: (i, question) for i, question in enumerate(questions)}
    answers = read_trajectories(folder / answers_file(own), Attempt)
    placed = [(*known.get(one.question_id, (len(known), Question(one.question, one.gold))), one) for one in answers]
    for _, question, one in sorted(placed, key=lambda own: (own[0], own[2].question_id, own[2].arm, own[2].sample)):
        yield read_answer(asked, question, one)
