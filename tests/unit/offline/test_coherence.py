"""Coherence `v2`, by hand: it tells apart what the original's score provably could not."""

from fractions import Fraction

import pytest

from syncline.offline.arithmetic import Counterfactual
from syncline.offline.coherence import Solution, score_coherence
from syncline.offline.regime_w import VERSIONS, Attempt, score_question

CHANGED = Counterfactual("", Fraction(48), Fraction(50), Fraction(30))
SOUND = "48 / 2 = 24 and 24 + 5 = 29. Answer: 29"
GUESSED = "20 + 9 = 29. Answer: 29"
WRONG_STEP = "48 / 2 = 25 and 24 + 5 = 29. Answer: 29"


def solution(text: str, answer: str = "29", *, rephrased: bool = False, twin: str | None = None) -> Solution:
    return Solution(text, answer, answer == "29", rephrased, twin)


def test_two_right_answers_of_one_question_differ_as_their_reasoning_does() -> None:
    texts = (SOUND, WRONG_STEP, GUESSED)
    rewards = [scores["reward"] for scores in score_coherence([solution(t) for t in texts], CHANGED)]
    # agreement 1 throughout, of weights 0.3, 0.3 and 0.25; steps 1, 1/2, 1; counterfactual 1, 0 (24 is a number of
    # nowhere, so nothing follows from 48), 0
    expected = [1.0, (0.3 + 0.15) / 0.85, (0.3 + 0.3) / 0.85]
    assert rewards == pytest.approx([1 + 0.5 * coherence for coherence in expected])
    _, originals = score_question([Attempt.of(text, "") for text in texts[::2]], "#### 29", VERSIONS["v8"])
    assert originals[0] == originals[1], "the original cannot tell the guess from the solution"


def test_signals_are_each_trajectorys_own() -> None:
    rows = [solution(SOUND), solution("no sums", "7"), solution("", "29", rephrased=True), solution("", "")]
    scored = score_coherence(rows, None)
    assert [one["agreement"] for one in scored] == pytest.approx([1 / 3, 0, 1 / 3, 0])
    assert [one["paraphrase"] for one in scored] == pytest.approx([1, 0, 1 / 3, 0])
    assert [one["steps"] for one in scored] == [1, None, None, None]
    assert [one["counterfactual"] for one in scored] == [None] * 4


def test_twin_and_replay_share_the_counterfactual() -> None:
    twins = [solution(SOUND, twin="30"), solution(SOUND, twin="29"), solution("so it is", twin="30"), solution("")]
    assert [one["counterfactual"] for one in score_coherence(twins, CHANGED)] == [1.0, 0.5, 1.0, None]


def test_a_wrong_answer_never_beats_a_right_one() -> None:
    """However coherent: 4 agree on 24 by flawless sums, one says 29 and nothing else."""
    crowd = [solution("48 / 2 = 24. Answer: 24", "24")] * 4
    *wrong, right = score_coherence([*crowd, solution("29")], CHANGED)
    assert max(one["reward"] or 0 for one in wrong) <= 0.5 < (right["reward"] or 0)


def test_a_lone_trajectory_without_a_signal_has_no_coherence() -> None:
    [alone] = score_coherence([solution("it is 29")], None)
    assert alone["coherence"] == 0.0 and alone["reward"] == 1.0 and alone["agreement"] is None
