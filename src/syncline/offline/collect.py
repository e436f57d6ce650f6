"""Rollouts of one frozen policy: every completion at once on every engine, on disk as it ends, scored when all are there.

`attempts.jsonl` grows; `rollouts.jsonl` is written whole from it. A collection that was killed reads its attempts back,
lets the workload decide again what they make due, and samples what is missing: no item is lost and none is done twice.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from syncline.config.offline_collect import Collect
from syncline.engines.client import EngineController
from syncline.envs.rendering import ChatPolicy, NoRoom, load_tokenizer
from syncline.errors import ConfigError, SyncError
from syncline.observe.files import write_atomically
from syncline.offline.gauge import Gauge
from syncline.offline.lines import AppendOnlyLines
from syncline.offline.questions import load_questions
from syncline.offline.records import Attempt, read_trajectories
from syncline.offline.replica import EngineReplica, Replica
from syncline.offline.sampler import Request, Sampler
from syncline.offline.scoring import score_attempts
from syncline.offline.work import WorkItem, Workload
from syncline.types import Completion, FinishReason, SamplingParams

ATTEMPTS_FILE = "attempts.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
LOCAL_ONLY = frozenset({"requests_per_engine", "lost_after_seconds"})
"""Fields of `collect` that no result depends on: a stage's digest leaves them out."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where and on what a collection runs."""

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


def collect(asked: Collect, place: Place, *, seed: int, show: Callable[[str], None]) -> dict[str, Any]:
    """Writes `rollouts.jsonl` in `place.folder` and returns what is worth telling of it: counts, tokens, rates.

    Raises `ConfigError` for questions that cannot be asked and for attempts of another model, configuration or file;
    `EngineError` when no engine is left. Whatever it raises, what was sampled stays and is not sampled again.
    """
    loaded = load_questions(asked.questions, seed=seed, heldout=False)
    workload = Workload(loaded.questions, asked, seed=seed)
    attempts = place.folder / ATTEMPTS_FILE
    policy = _Prompts(place, asked)
    with AppendOnlyLines(attempts, key="key") as lines:
        before = {one.key: one for one in read_trajectories(attempts, Attempt)} if lines.done else {}
        model = engine_digest(place.engine_urls, adapter=asked.adapter, timeout_seconds=place.timeout_seconds)
        facts = asyncio.run(_sample(asked, place, workload, before, policy, lines, model, show))
    items = {item.key: item for item in _all_items(workload, asked, loaded.questions, seed, attempts)}
    sampled = [(items[one.key], one) for one in read_trajectories(attempts, Attempt)]
    rollouts = list(score_attempts(sampled, workload, asked.coherence))
    write_atomically(place.folder / ROLLOUTS_FILE, "".join(one.model_dump_json() + "\n" for one in rollouts))
    return facts
