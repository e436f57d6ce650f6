"""The wire reads what its past has written."""

from dataclasses import replace
from pathlib import Path

import pytest

from syncline.testing import make_group
from syncline.trajectory import wire

WITHOUT_WEIGHTS = Path(__file__).parents[2] / "golden" / "group_without_weights.json"


def test_a_group_written_before_rollouts_had_weights_reads_as_weight_one() -> None:
    assert wire.decode_group(WITHOUT_WEIGHTS.read_bytes()) == make_group(
        "math", 3, policy_version=2, rewards=(1.0, 0.0, None)
    )


def test_weights_cross_the_wire() -> None:
    group = make_group("math", 0)
    weighted = replace(group, rollouts=(replace(group.rollouts[0], weight=0.25), *group.rollouts[1:]))
    read = wire.decode_group(wire.encode_group(weighted))
    assert read == weighted
    assert [rollout.weight for rollout in read.rollouts] == [0.25, 1.0]


@pytest.mark.parametrize("weight", [b"-1.0", b'"2"', b"null"])
def test_a_faulty_weight_is_refused_by_name(weight: bytes) -> None:
    body = wire.encode_group(make_group("math", 0)).replace(b'"weight":1.0', b'"weight":' + weight, 1)
    with pytest.raises(wire.Malformed, match="weight"):
        wire.decode_group(body)
