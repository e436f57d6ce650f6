"""What rank 0 is answered, or fails at, reaches every rank; a rank that goes down alone holds nobody up."""

import os
import signal
from typing import Any

import pytest
import torch
from rank_processes import on_ranks

from syncline.bridges.ranks import Ranks
from syncline.errors import EngineError, TrainingError
from syncline.learner.distributed import on_first


class Engine:
    """What only rank 0 has."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def add(self, a: int, *, b: int) -> int:
        self.calls.append("add")
        return a + b

    def refuse(self) -> None:
        raise EngineError("the engine is asleep")

    def break_down(self) -> None:
        raise OSError("no space left")


def asked(ranks: Ranks) -> tuple[int, str, str, list[str]]:
    engine = Engine() if ranks.is_first else None
    part = on_first(engine, ranks)
    total = part.add(2, b=3)
    with pytest.raises(EngineError) as refused:
        part.refuse()
    with pytest.raises(TrainingError) as broken:
        part.break_down()
    return total, str(refused.value), str(broken.value), engine.calls if engine else []


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return on_ranks(everything)


def everything(ranks: Ranks) -> dict[str, Any]:
    questions = (asked, failed, refused_by_one, bits)
    return {question.__name__: question(ranks) for question in questions}


def test_every_rank_gets_the_answer_or_the_error_of_one_call(told: list[dict[str, Any]]) -> None:
    first, second = (answer["asked"] for answer in told)
    assert first[:3] == second[:3] == (5, "the engine is asleep", "rank 0 failed: OSError: no space left")
    assert (first[3], second[3]) == (["add"], [])


def failed(ranks: Ranks) -> list[str]:
    """Each rank fails by itself, as on a gradient that is not finite, and cleans up in its own time."""
    engine = Engine() if ranks.is_first else None
    part = on_first(engine, ranks)
    try:
        raise ValueError("on every rank, unknown to the others")
    except ValueError:
        part.add(1, b=1)
    assert part.add(1, b=1) == 2
    return engine.calls if engine else []


def test_what_a_failing_rank_cleans_up_waits_for_nobody(told: list[dict[str, Any]]) -> None:
    assert [answer["failed"] for answer in told] == [["add", "add"], []]


def refused_by_one(ranks: Ranks) -> tuple[int, str]:
    """What rank 1 alone refuses, rank 0 must not go on from."""

    def check() -> int:
        if ranks.rank == 1:
            raise EngineError("mine is of another shape")
        return 7

    with pytest.raises(EngineError) as refused:
        ranks.together(check)
    return ranks.together(lambda: ranks.rank), str(refused.value)


def test_what_one_rank_refuses_all_refuse(told: list[dict[str, Any]]) -> None:
    refused = [answer["refused_by_one"] for answer in told]
    assert refused == [(0, "mine is of another shape"), (1, "mine is of another shape")]


def bits(ranks: Ranks) -> list[torch.Tensor]:
    """The bits of rank 1's tensors, of types that collectives cannot add."""
    sent = []
    for values in (torch.tensor([-0.0, 1.5], dtype=torch.bfloat16), torch.tensor([-7], dtype=torch.int16)):
        tensor = values if ranks.rank == 1 else torch.zeros_like(values)
        ranks.broadcast_(tensor, source=1)
        sent.append(tensor)
    return sent


def test_a_broadcast_moves_bits_whatever_they_mean(told: list[dict[str, Any]]) -> None:
    for floats, integers in (answer["bits"] for answer in told):
        assert floats.view(torch.int16).tolist() == [-32768, 0x3FC0]
        assert integers.tolist() == [-7]


def left(ranks: Ranks) -> None:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.sum_(torch.ones(1))


def test_a_dead_rank_ends_the_others_with_an_error() -> None:
    with pytest.raises(AssertionError, match=r"TrainingError: rank 0 of 2 lost rank 1, or waited for it longer"):
        on_ranks(left)
