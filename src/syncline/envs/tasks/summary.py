"""Pictures to be summed up as JSON: a row has `images`, a reference `summary` and `metadata`, the reward many parts.

    {"images": ["a.png"], "summary": "{\\"统计\\": [...]}", "metadata": {"_fusion_template": "bbu_summary"}}

`metadata` tells the domain by the first of `_fusion_template`, `_fusion_source` and `_fusion_domain` that begins with
`bbu` or `rru`; `_fusion_mode: dense` marks a row of another kind, worth 0 throughout; a `summary_ref` stands in for
`summary`. What each part of the reward is: `summary_rewards`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncline.envs.rows import Rows, open_rows
from syncline.envs.scoring import Score, check_weights, weighted_score
from syncline.envs.single_turn import SingleTurn
from syncline.envs.tasks.summary_reading import DOMAINS, Category, Reading, Schema
from syncline.envs.tasks.summary_rewards import REWARDS, rewards
from syncline.errors import ConfigError
from syncline.observe.images import image_ref
from syncline.types import ImageRef, Message

PROMPT = "Sum up what the picture shows."
_TELLS_DOMAIN = ("_fusion_template", "_fusion_source", "_fusion_domain")


@dataclass(frozen=True, slots=True)
class SummaryTask:
    images: tuple[ImageRef, ...]
    prompt: str
    reference: str
    domain: str
    dense: bool


class Summary(SingleTurn):
    """`weights` weigh the parts of the reward, by name; the others are reported only.

    Rows come from `path` and `heldout_path` (JSONL), the files of their images from `images_dir` (default: the folder
    of the rows). `prompt` is asked where a row has none of its own. `schema` is the JSON file that `schema_tree` needs:
    domain → `top` (keys) and `categories` (name → `required`, `required_any`, `allowed` attributes).
    """

    name = "summary"

    def __init__(
        self,
        *,
        path: str,
        heldout_path: str | None = None,
        images_dir: str | None = None,
        weights: Mapping[str, float],
        prompt: str = PROMPT,
        schema: str | None = None,
        seed: int = 0,
    ) -> None:
        self._weights = check_weights(weights, parts=REWARDS)
        self._schemas = _schemas(schema)
        if self._weights.get("schema_tree") and schema is None:
            raise ConfigError(["schema: is not given, and weights.schema_tree needs it; give a JSON file"])
        self._prompt, self._images_dir = prompt, images_dir
        train, heldout = open_rows(path, heldout_path, hub=None)
        self._rows = Rows(train, heldout, build=self._task, key=_key, seed=seed)
        self.num_train_tasks = len(self._rows.train)

    def task(self, index: int, *, split: str = "train") -> SummaryTask:
        return self._rows.task(index, split=split)

    def prompt(self, task: SummaryTask) -> Sequence[Message]:
        return [Message("user", task.prompt, task.images)]

    def score(self, task: SummaryTask, text: str) -> Score:
        schema = self._schemas.get(task.domain)
        reading = Reading.of(text, task.reference, domain=task.domain, dense=task.dense, schema=schema)
        return weighted_score(rewards(reading), self._weights)

    def _task(self, row: Any, where: str) -> SummaryTask:
        """Raises `ConfigError` naming the row and its field."""
        row = row if isinstance(row, Mapping) else {}
        images, metadata = row.get("images"), row.get("metadata") or {}
        if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
            raise ConfigError([f"{where}: field 'images' must be a list of one or more paths"])
        if not isinstance(metadata, Mapping) or not isinstance(row.get("prompt") or "", str):
            raise ConfigError([f"{where}: field 'metadata' must be an object, and 'prompt' a text"])
        reference = metadata.get("summary_ref") or row.get("summary")
        if not isinstance(reference, str) or not reference.strip():
            raise ConfigError([f"{where}: field 'summary' must be a text: JSON, or 无关图片"])
        folder = Path(self._images_dir) if self._images_dir else Path(where.rpartition(":")[0]).parent
        refs = tuple(image_ref(folder / image) for image in images)
        dense = metadata.get("_fusion_mode") == "dense"
        return SummaryTask(refs, row.get("prompt") or self._prompt, reference, _domain(metadata, where), dense)


def _domain(metadata: Mapping[str, Any], where: str) -> str:
    for field in _TELLS_DOMAIN:
        domain = str(metadata.get(field) or "")[:3].upper()
        if domain in DOMAINS:
            return domain
    known = ", ".join(_TELLS_DOMAIN)
    raise ConfigError([f"{where}: metadata says no domain; one of {known} must begin with bbu or rru"])


def _key(task: SummaryTask) -> str:
    return " ".join([task.prompt, *(image.sha256 for image in task.images)])


def _schemas(path: str | None) -> dict[str, Schema]:
    if path is None:
        return {}
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
        return {domain: _schema(tree) for domain, tree in read.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"schema: {path!r} is no schema ({error!r}); see the environment's docstring"]) from error


def _schema(tree: Mapping[str, Any]) -> Schema:
    categories = {
        name: Category(
            frozenset(given.get("required", ())),
            tuple(frozenset(group) for group in given.get("required_any", ())),
            frozenset(given.get("allowed", ())),
        )
        for name, given in tree["categories"].items()
    }
    return Schema(frozenset(tree["top"]), categories)
