"""How well a score tells right from wrong."""

import pytest
from trajectories import trajectory

from syncline.offline.scoring import aurocs


def test_auroc_counts_the_pairs_that_a_score_orders_rightly() -> None:
    scores = [(0.9, True), (0.5, True), (0.5, False), (0.1, False), (0.7, False), (None, True)]
    rollouts = [
        trajectory(sample=i, text="x", correct=right, scores={"reward": 1.0, "steps": score, "agreement": 0.3})
        for i, (score, right) in enumerate(scores)
    ]
    twin = trajectory(sample=9, text="x", arm="solve@cf", correct=True, scores={"reward": 1.0, "steps": 0.0})
    # 0.9 beats all three; 0.5 ties with 0.5, beats 0.1, loses to 0.7
    assert aurocs([*rollouts, twin]) == {"agreement": 0.5, "steps": pytest.approx((3 + 0.5 + 1) / 6)}
    assert aurocs(rollouts[:2]) == {}
