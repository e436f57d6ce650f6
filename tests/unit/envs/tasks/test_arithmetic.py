"""Expressions, answers and scores worked by hand; the split; what the constructor refuses."""

from itertools import product

import pytest

from syncline.envs.scoring import Score
from syncline.envs.single_turn import HELDOUT_ONE_IN
from syncline.envs.tasks.arithmetic import Arithmetic, ArithmeticTask, split_of
from syncline.errors import ConfigError
from syncline.types import Message


@pytest.mark.parametrize(
    ("operands", "operators", "expression", "answer"),
    [
        ((12, 7), ("+",), "12+7", 19),
        ((3, 10), ("-",), "3-10", -7),
        ((2, 3, 4), ("+", "*"), "2+3*4", 14),
        ((20, 3, 4, 5), ("-", "*", "+"), "20-3*4+5", 13),
        ((2, 3, 4), ("*", "*"), "2*3*4", 24),
    ],
)
def test_expression_and_answer(operands: tuple, operators: tuple, expression: str, answer: int):
    task = ArithmeticTask(operands, operators, "any")
    assert (task.expression, task.answer) == (expression, answer)
    assert Arithmetic().prompt(task) == [Message("user", f"{expression}=")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("123", {"correct": 1.0, "format": 1.0, "digits": 1.0}),
        (" 123\n", {"correct": 1.0, "format": 1.0, "digits": 1.0}),
        ("124", {"correct": 0.0, "format": 1.0, "digits": 2 / 3}),
        ("1234", {"correct": 0.0, "format": 1.0, "digits": 3 / 4}),
        ("0123", {"correct": 0.0, "format": 1.0, "digits": 0.0}),
        ("123.", {"correct": 0.0, "format": 0.0, "digits": 3 / 4}),
        ("12+3", {"correct": 0.0, "format": 0.0, "digits": 2 / 4}),
        ("", {"correct": 0.0, "format": 0.0, "digits": 0.0}),
    ],
)
def test_only_the_exact_integer_is_correct(text: str, parts: dict):
    task = ArithmeticTask((120, 3), ("+",), "any")
    assert Arithmetic().score(task, text) == Score(parts["correct"], parts)


def test_partial_credit_is_what_the_weights_say():
    task = ArithmeticTask((120, 3), ("+",), "any")
    environment = Arithmetic(weights={"correct": 1.0, "digits": 0.3})
    assert environment.score(task, "124").reward == pytest.approx(0.2)
    assert environment.score(task, "123").reward == pytest.approx(1.3)


PINNED = [(0, 2), (0, 3), (1, 2), (2, 0), (2, 1), (2, 5), (3, 0), (5, 2)]


def test_split_is_fixed_whatever_order_and_operators():
    """Pinned: another hash would let a base model have seen what is held out."""
    assert [pair for pair in product(range(6), repeat=2) if split_of(pair) == "heldout"] == PINNED
    assert all(split_of((a, b)) == split_of((b, a)) for a, b in product(range(30), repeat=2))
    share = sum(split_of(pair) == "heldout" for pair in product(range(100), repeat=2)) / 10_000
    assert share == pytest.approx(1 / HELDOUT_ONE_IN, abs=0.02)


def test_seeds_and_indices_give_different_tasks_of_the_same_split():
    tasks = [Arithmetic(seed=seed).task(index, split="heldout") for seed in (0, 1) for index in range(50)]
    assert len(set(tasks)) > 90
    assert {split_of(task.operands) for task in tasks} == {"heldout"}


def test_levels_are_drawn_by_weight_and_within_bounds():
    levels = ({"digits": 1, "terms": 3, "weight": 3.0}, {"digits": 3, "terms": 2})
    tasks = [Arithmetic(levels=levels, operations=("+", "*")).task(index) for index in range(400)]
    easy = [task for task in tasks if task.level == "1 digits x 3 terms"]
    assert all(len(task.operands) == 3 and max(task.operands) <= 9 for task in easy)
    assert all(len(task.operands) == 2 and max(task.operands) <= 999 for task in tasks if task not in easy)
    assert len(easy) / len(tasks) == pytest.approx(0.75, abs=0.08)
    assert {op for task in easy for op in task.operators} == {"+", "*"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"operations": []}, "operations"),
        ({"operations": ["/"]}, "operations"),
        ({"levels": []}, "levels: is empty"),
        ({"levels": [{"digit": 2}]}, "levels.*digit"),
        ({"levels": [{"digits": 2}, {"digits": 0}]}, r"levels\.1.*digits >= 1"),
        ({"levels": [{"digits": 2, "terms": 1}]}, r"levels\.0.*terms >= 2"),
        ({"weights": {"corect": 1.0}}, "weights.*correct, format, digits"),
    ],
)
def test_unusable_arguments_are_refused_by_name(args: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Arithmetic(**args)
