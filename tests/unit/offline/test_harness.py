"""Our reading of answers by lm-evaluation-harness' filters against its own (`scripts/lm_eval_golden.py`)."""

import json
from pathlib import Path

from syncline.offline.harness import exact_match, flexible_extract, strict_match

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "lm_eval_gsm8k.json").read_text())


def test_every_text_is_read_and_scored_as_the_harness_does() -> None:
    for row in GOLDEN:
        strict, flexible = strict_match(row["text"]), flexible_extract(row["text"])
        assert [strict, exact_match(strict, row["answer"])] == row["strict-match"], row
        assert [flexible, exact_match(flexible, row["answer"])] == row["flexible-extract"], row
    assert {tuple(r[f][1] for f in ("strict-match", "flexible-extract")) for r in GOLDEN} > {
        (True, True),
        (False, False),
    }
