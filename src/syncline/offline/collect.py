"""Rollouts of one frozen policy: every completion at once on every engine, on disk as it ends, scored when all are.

`attempts.jsonl` grows; `rollouts.jsonl` is written whole from it. A collection that was killed reads its attempts back,
lets the workload decide again what they make due, and samples what is missing: no item is lost and none is done twice.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from syncline.config.offline_collect import Collect
from syncline.envs.rendering import load_tokenizer, rendered
from syncline.errors import ConfigError
from syncline.observe.files import write_atomically
from syncline.offline.gauge import Gauge, gauging
from syncline.offline.lines import AppendOnlyLines
from syncline.offline.questions import Loaded, load_questions
from syncline.offline.records import Attempt, Said, read_trajectories
from syncline.offline.replica import EngineReplica, allow_connections
from syncline.offline.sampler import Request, Sampler
from syncline.offline.scoring import aurocs, score_attempts
from syncline.offline.work import WorkItem, Workload
from syncline.types import Completion, FinishReason, Message, SamplingParams

ATTEMPTS_FILE = "attempts.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
SHOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where and on what a collection runs: nothing here changes what is sampled."""

    folder: Path
    engine_urls: tuple[str, ...]
    tokenizer: str
    """A folder or a hub name."""
    max_length: int
    """Prompt and completion together: the engines' context."""
    timeout_seconds: float
    """For one completion."""
    slots: int
    """Completions that one engine runs at once."""
    gpus: tuple[str, ...] = ()
    """As nvidia-smi names them; empty: none is watched."""


def collect(
    asked: Collect, place: Place, *, model: str, seed: int, show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Writes `rollouts.jsonl` in `place.folder` and returns counts, tokens, seconds and rates: of this process
    alone, but for `trajectories` and `total_tokens`.

    `model` is the digest of the weights that the engines hold (`model_held`). Raises `ConfigError` for questions that
    cannot be asked and attempts of another model or collection, `EngineError` when no engine is left. Whatever it
    raises, what was sampled stays, and is not sampled again.
    """
    loaded = load_questions(asked.questions, seed=seed, heldout=False)
    collection = _Collection(asked, place, loaded, model=model, seed=seed)
    with AppendOnlyLines(place.folder / ATTEMPTS_FILE, key="key") as lines:
        pending = collection.take_up(lines)
        resumed = len(collection.attempts)
        sampler, gauge = asyncio.run(collection.sample(pending, lines, show))
    rollouts = list(score_attempts(collection.attempts.values(), collection.workload, asked.coherence))
    text = "".join(f"{one.model_dump_json()}\n" for one in rollouts)
    write_atomically(place.folder / ROLLOUTS_FILE, text)
    tally = sampler.tally
    return {
        "trajectories": len(collection.attempts),
        "resumed": resumed,
        "sampled": tally.done,
        "sampled_again": tally.given_back,
        "engines_lost": len(tally.lost),
        "total_tokens": sum(attempt.num_tokens for _, attempt in collection.attempts.values()),
        "tokens": tally.tokens,
        "prompt_tokens": tally.prompt_tokens,
        "seconds": gauge.seconds,
        "tokens_per_second": tally.tokens / max(gauge.seconds, 1e-9),
        "slots_busy": gauge.slots_busy.value,
        "gpu_busy": gauge.gpu_busy.value,
        "duplicate_questions": loaded.num_duplicates,
        **collection.workload.counts(),
        **{f"auroc_{name}": value for name, value in aurocs(rollouts).items()},
        **{f"finished_by_{reason}": count for reason, count in sorted(tally.finish_reasons.items())},
    }


async def model_held(engine_urls: Iterable[str], *, adapter: str | None, timeout_seconds: float) -> str:
    """The digest all engines sample from, `adapter` loaded. Raises `EngineError`, `ConfigError` when they differ."""
    held: dict[str, str] = {}
    for url in engine_urls:
        async with EngineReplica(url, timeout_seconds=timeout_seconds, max_connections=1, adapter=adapter) as replica:
            held[url] = await replica.digest()
    if len(set(held.values())) > 1:
        told = ", ".join(f"{url} holds {digest[:12]}" for url, digest in held.items())
        raise ConfigError([f"--engine-url: the engines hold different weights: {told}; collect from one model"])
    return next(iter(held.values()))


def attempt_of(request: Request, completion: Completion, *, tokenizer: Any, model: str) -> Attempt:
    item = request.item
    return Attempt(
        key=item.key,
        question_id=item.question_id,
        question=item.question,
        gold=item.gold,
        arm=item.arm.name,
        sample=item.sample,
        seed=item.seed,
        prompt=tuple(Said(role=m.role, content=m.content) for m in item.prompt),
        text=tokenizer.decode(list(completion.token_ids), skip_special_tokens=True),
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        num_tokens=len(completion.token_ids),
        num_prompt_tokens=len(request.prompt_token_ids),
        finish_reason="stop" if completion.finish_reason is FinishReason.STOP else "length",
        model=model,
    )


def prompt_tokens(tokenizer: Any, prompt: Sequence[Message]) -> tuple[int, ...]:
    try:
        return tuple(rendered(tokenizer, prompt))
    except ValueError as error:
        raise ConfigError([f"model.tokenizer: {error}; give one whose template takes such a prompt"]) from error


def request_of(item: WorkItem, ids: tuple[int, ...], *, max_tokens: int, max_length: int) -> Request:
    """Raises `ConfigError` for a prompt that leaves no room for an answer."""
    room = max_length - len(ids)
    if room < 1:
        where = f"question {item.question_id} ({item.question[:60]!r}) has {len(ids)} prompt tokens"
        raise ConfigError([f"model.max_length: {max_length}, but {where}; raise it, or leave it out"])
    arm = item.arm
    sampling = SamplingParams(min(max_tokens, room), temperature=arm.temperature, top_p=arm.top_p, seed=item.seed)
    return Request(item, ids, sampling)


class _Collection:
    def __init__(self, asked: Collect, place: Place, loaded: Loaded, *, model: str, seed: int) -> None:
        self.workload = Workload(loaded.questions, asked, seed=seed)
        self.attempts: dict[str, tuple[WorkItem, Attempt]] = {}
        """On disk, by key."""
        self._asked, self._place, self._model = asked, place, model
        self._tokenizer = load_tokenizer(place.tokenizer)
        self._prompt_ids: dict[str, tuple[int, ...]] = {}

    def take_up(self, lines: AppendOnlyLines) -> list[Request]:
        """What an earlier process left to do. Raises `ConfigError` for attempts that are not of this collection."""
        before = {one.key: one for one in read_trajectories(lines.path, Attempt)} if lines.done else {}
        foreign = next((one for one in before.values() if one.model != self._model), None)
        if foreign is not None:
            whose = f"{foreign.model[:12]}, and the engines hold {self._model[:12]}"
            raise ConfigError([f"{lines.path}: was sampled from {whose}; collect into another folder, or remove it"])
        due, pending = deque(self.workload.first()), []
        while due:
            item = due.popleft()
            if (attempt := before.pop(item.key, None)) is None:
                pending.append(self._request(item))
            else:
                due += self._note(item, attempt)
        if before:
            stray = f"{len(before)} attempts are of no work item of this configuration, such as {next(iter(before))}"
            raise ConfigError([f"{lines.path}: {stray}; collect into another folder, or remove it"])
        return pending

    async def sample(
        self, pending: list[Request], lines: AppendOnlyLines, show: Callable[[str], None]
    ) -> tuple[Sampler, Gauge]:
        asked, place = self._asked, self._place
        part = -(-len(pending) // len(place.engine_urls)) or 1  # or the first engine would take all of a little
        concurrency = asked.requests_per_engine or min(2 * place.slots, part)
        allow_connections(concurrency * len(place.engine_urls), field="collect.requests_per_engine")
        async with AsyncExitStack() as stack:
            replicas = [
                await stack.enter_async_context(
                    EngineReplica(
                        url, timeout_seconds=place.timeout_seconds, max_connections=concurrency, adapter=asked.adapter
                    )
                )
                for url in place.engine_urls
            ]
            sampler = Sampler(
                replicas,
                lines,
                model=self._model,
                record=partial(attempt_of, tokenizer=self._tokenizer, model=self._model),
                on_written=self._written,
                concurrency=concurrency,
                lost_after_seconds=asked.lost_after_seconds,
            )
            gauge = Gauge(sampler.tally, done_before=len(self.attempts), slots=place.slots)
            async with gauging(gauge, show, gpus=place.gpus, show_seconds=SHOW_SECONDS):
                await sampler.run(pending)
        return sampler, gauge

    def _request(self, item: WorkItem) -> Request:
        asked, prompt = self._asked, item.prompt
        text = prompt[0].content
        if text not in self._prompt_ids:
            self._prompt_ids[text] = prompt_tokens(self._tokenizer, prompt)
        return request_of(item, self._prompt_ids[text], max_tokens=asked.max_tokens, max_length=self._place.max_length)

    def _written(self, request: Request, attempt: Attempt) -> list[Request]:
        return [self._request(item) for item in self._note(request.item, attempt)]

    def _note(self, item: WorkItem, attempt: Attempt) -> list[WorkItem]:
        """What is on disk now, and what is due because of it."""
        self.attempts[item.key] = (item, attempt)
        return self.workload.finished(item, attempt.text)
