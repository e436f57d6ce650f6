"""The numbers of the original, reproduced: `tests/golden/regime_w.json` holds what its own code gave at four revisions.

The texts of one case, `logged8`, are not there, only their lengths: what reads words beyond their number is given.
"""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from syncline.offline.answers import ANSWER_RULES
from syncline.offline.regime_w import VERSIONS, Attempt, Metrics, metrics, rewards, score_question

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "regime_w.json").read_text())
OLD_WEIGHTS = (0.4, 0.3, 0.3)
REVISIONS = {
    "seed_era_8_arms_rev_400aee9": VERSIONS["v8"],
    "eleven_arm_rev_3557bf7_no_quality_old_weights": replace(VERSIONS["v11"], weights=OLD_WEIGHTS, has_quality=False),
    "eleven_arm_rev_101f64a_quality_old_weights": replace(VERSIONS["v11"], weights=OLD_WEIGHTS),
    "eleven_arm_final_rev_321f030_to_HEAD": VERSIONS["v11"],
}
LONE_PROBE = ("eleven_arm_rev_101f64a_quality_old_weights", "single_correct_probe")
"""That revision alone gave a lone right answer the quality 0.5 whatever its arm; in `v11` a probe gets 0.8."""
CASES = sorted(GOLDEN["seed_era_8_arms_rev_400aee9"])
EXTRACTED = [("v8", row) for row in GOLDEN["answer_extraction"]["400aee9"]]
EXTRACTED += [("v11", row) for row in GOLDEN["answer_extraction"]["321f030"]]


def attempts(case: dict) -> list[Attempt]:
    arms = case["arms"] or [""] * len(case["texts"])
    withheld = "withheld" in case["texts"][0]
    texts = [" ".join(["so"] * (n - 2) + ["####", "72"]) for n in case["num_tokens"]] if withheld else case["texts"]
    return [Attempt(*row) for row in zip(texts, arms, case["num_tokens"], strict=True)]


@pytest.mark.parametrize(("revision", "name"), [*product(REVISIONS, CASES)])
def test_metrics_and_rewards_are_the_originals(revision: str, name: str) -> None:
    case, version = GOLDEN[revision][name], REVISIONS[revision]
    asked, expected = attempts(case), Metrics(**case["metrics"])
    measured = metrics(asked, version)
    if name == "logged8" and version.reads_texts:
        end, path, cf = version.weights
        measured = replace(measured, s_path=expected.s_path)
        measured = replace(measured, s_wm=end * measured.s_end + path * measured.s_path + cf * measured.s_cf)
    for field in ("s_end", "s_path", "s_cf", "s_wm"):
        assert getattr(measured, field) == pytest.approx(getattr(expected, field), rel=1e-15, abs=1e-15), field
    wanted = list(case["rewards"])
    if (revision, name) == LONE_PROBE:
        wanted[8] += 0.3 * (0.8 - 0.5)
    assert rewards(asked, case["gold"], version, measured) == pytest.approx(wanted, rel=1e-15, abs=1e-15)


@pytest.mark.parametrize(("version", "row"), EXTRACTED)
def test_answers_are_read_as_the_original_read_them(version: str, row: dict) -> None:
    rule = ANSWER_RULES[version]
    assert (rule.extract(row["text"]), rule.answer(row["text"])) == (row["extracted"], row["normalised"])


def test_no_trajectory_and_one() -> None:
    for version in VERSIONS.values():
        assert metrics([], version).s_end == 0.0 and metrics([], version).s_cf == 0.5
        assert metrics([Attempt.of("Answer: 4", "")], version).s_end == 1.0


def test_the_originals_coherence_cancels_inside_a_question() -> None:
    """Two right answers, one of them by nonsense, get the same reward: what `coherence.py` is for."""
    sound, unsound = "3 + 4 = 7 #### 7", "3 + 4 = 9 #### 7"
    _, (first, second) = score_question(
        [Attempt.of(sound, "wolfram_0"), Attempt.of(unsound, "wolfram_1")], "#### 7", VERSIONS["v8"]
    )
    assert first == second


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1,875", "1875"),
        ("Answer: $1,234.50", "2469/2"),
        ("Answer: 18.0", "18"),
        ("Answer: .5", "1/2"),
        ("Answer: 3/4", "3/4"),
        ("Answer: −7", "-7"),
        ("Answer: -$5", "-5"),
        ("ANSWER: 7 and 8", "7"),
        ("**Answer:** 18", "18"),
        ("Answer: \\boxed{18}.", "18"),
        ("Answer: well, it is 5", "5"),
        ("Answer: none #### 5", "5"),
        ("Answer: 18 Answer: 20", "20"),
        ("no number, here", ""),
        ("Answer: 1/0", ""),
        ("Answer: " + "9" * 50, ""),
        ("it takes 4 days", "4"),
        ("Answer:" + " " * 20_000 + "\n" * 20_000, ""),
        ("Answer: - $ 5", "-5"),
    ],
)
def test_our_own_reading(text: str, answer: str) -> None:
    assert ANSWER_RULES["v2"].answer(text) == answer
