"""Writes tests/golden/lm_eval_gsm8k.json: what lm-evaluation-harness's own classes make of texts. Needs `lm_eval`.

python scripts/lm_eval_golden.py [rows.jsonl]     with rows of GSM8K: counts where our reading differs, writes nothing
"""

import functools
import json
import random
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.metrics import exact_match_hf_evaluate  # pyright: ignore[reportMissingImports]
from lm_eval.filters.extraction import RegexFilter  # pyright: ignore[reportMissingImports]

from syncline.offline.harness import exact_match, flexible_extract, strict_match

TARGET = Path(__file__).resolve().parent.parent / "tests" / "golden" / "lm_eval_gsm8k.json"
TEXTS = (
    "3 * 4 = 12 #### 12",
    "#### 1,234",
    "#### $18.00",
    "#### -5.",
    "####18",
    "#### 7 and then #### 8",
    "so it is 42.",
    "The answer is $1,080.",
    "no number",
    "",
    "5",
    "x = 5",
    ".",
    "...",
    "costs $5",
    "about 3.50 or 4",
    "-7",
    "minus −7",
    "Answer: 12 apples",
    "1/2",
    "\\boxed{18}",
    "12:30",
    "1e3",
    "50%",
    "#### 18 dollars, not 20",
    "18 Question: 19",
    "18</s>20",
    "a\n#### 9\nb 10",
    "#### ,",
    "$",
    "$$",
    "2,000.00",
)
ANSWERS = ("12", "1,234", "some steps <<6*3=18>>18\n#### 18", "-5", "1080", "5", "2000", "9", "")


def main() -> None:
    if len(sys.argv) > 1:
        compare([json.loads(line)["answer"] for line in Path(sys.argv[1]).read_text().splitlines()])
        return
    rows = [json.dumps(reading(text, answer), ensure_ascii=False) for text in TEXTS for answer in ANSWERS]
    TARGET.write_text("[\n" + ",\n".join(rows) + "\n]\n")


def compare(answers: list[str]) -> None:
    pairs = [(text, answer) for answer in answers for text in variants(answer)]
    differ = [pair for pair in pairs if reading(*pair) != own_reading(*pair)]
    print(f"{len(pairs)} outputs, read differently: {len(differ)}", differ[:3])


def variants(answer: str) -> Iterator[str]:
    """A right output, a wrong one, one without marks, one cut off."""
    rng = random.Random(answer)
    number = answer.rpartition("#### ")[2]
    yield answer
    yield answer.replace(f"#### {number}", f"#### {rng.randrange(1000)}")
    yield answer.replace("#### ", rng.choice(["Answer: ", "The answer is $", "so it is ", "= "])) + rng.choice(
        ["", "."]
    )
    yield answer[: rng.randrange(len(answer))]


def reading(text: str, answer: str) -> dict[str, Any]:
    """By the library: its task's filters, read from its own file, and its metric."""
    settings = task_settings()
    metric = {key: value for key, value in settings["metric_list"][0].items() if key.startswith(("ignore", "regexes"))}
    sampled = text
    for end in settings["generation_kwargs"]["until"]:
        sampled = sampled.partition(end)[0]
    found: dict[str, Any] = {"text": text, "answer": answer}
    for one in settings["filter_list"]:
        options = {key: value for key, value in one["filter"][0].items() if key != "function"}
        [[read]] = RegexFilter(**options).apply([[sampled]], [{}])
        score = exact_match_hf_evaluate(predictions=[read], references=[answer], **metric)["exact_match"]
        found[one["name"]] = [read, bool(score)]
    return found


@functools.cache
def task_settings() -> Any:
    return yaml.safe_load((files("lm_eval") / "tasks/gsm8k_platinum/gsm8k-platinum.yaml").read_text())


def own_reading(text: str, answer: str) -> dict[str, Any]:
    strict, flexible = strict_match(text), flexible_extract(text)
    return {
        "text": text,
        "answer": answer,
        "strict-match": [strict, exact_match(strict, answer)],
        "flexible-extract": [flexible, exact_match(flexible, answer)],
    }


if __name__ == "__main__":
    main()
