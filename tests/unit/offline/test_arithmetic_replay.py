"""Equations of texts, by hand; and what a text would have answered had the question named another number."""

from fractions import Fraction

import pytest

from syncline.offline.arithmetic import counterfactual, equations, replay

QUESTION = "A farm has 68 hens and sells half of them, then buys 5 more for $1,200. How many hens are there?"
SOLUTION = "It keeps 68/2=<<68/2=34>>34 hens. Then 34+5=<<34+5=39>>39.\n#### 39"


@pytest.mark.parametrize(
    ("text", "stated", "holds"),
    [
        ("<<48/2=24>>24", ["24"], [True]),
        ("She has $3 × 4 = $12 left, and 2 x 3 = 7.", ["12", "7"], [True, False]),
        ("20% * 50 = 10", ["10"], [True]),
        ("10 / 3 = 3.33", ["333/100"], [True]),
        ("10 / 3 = 3", ["3"], [False]),
        ("1,000 + 5 = 1,005", ["1005"], [True]),
        ("1. 3 + 4 = 7\n2. (2+3)*4 = 20", ["7", "20"], [True, True]),
        ("5 + 3*4 = 5 + 12 = 17", ["17"], [True]),
        ("12 - 5 = 7.5", ["15/2"], [False]),
        ("4 / 0 = 4", ["4"], [False]),
        ("x = 3, 5 = 5, 2020-10-12 is a day", [], []),
        ("(" * 5000 + "1+" * 5000, [], []),
    ],
)
def test_equations(text: str, stated: list[str], holds: list[bool]) -> None:
    found = equations(text)
    assert ([str(one.stated) for one in found], [one.holds for one in found]) == (stated, holds)


def test_replay_follows_results_from_step_to_step() -> None:
    program = equations("48 / 2 = 24. 24 + 5 = 29. So 29 * 10 = 290.")
    assert replay(program, Fraction(29), old=Fraction(48), new=Fraction(50)) == 30
    assert replay(program, Fraction(290), old=Fraction(5), new=Fraction(6)) == 300
    assert replay(program, Fraction(7), old=Fraction(48), new=Fraction(50)) is None, "it never stated 7"


def test_counterfactual_is_the_first_change_that_stays_whole() -> None:
    changed = counterfactual(QUESTION, SOLUTION, Fraction(39))
    assert changed is not None
    assert (changed.old, changed.new, changed.answer) == (68, 70, 40), "69 hens have no whole half"
    assert changed.question == QUESTION.replace("68", "70")


@pytest.mark.parametrize(
    ("question", "solution"),
    [
        ("He has 48 hens and 48 cows.", "48/2=<<48/2=24>>24\n#### 24"),
        ("He has two dozen hens.", "2*12=<<2*12=24>>24\n#### 24"),
        ("He has 48 hens.", "He has <<48/2=25>>25\n#### 25"),
        ("He has 48 hens.", "There are 48.\n#### 48"),
        ("47 carrots for 4 goats, the same for each: what is left?", "<<11*4=44>>44 <<47-44=3>>3\n#### 3"),
        ("2 pairs of $50 at 40 percent off", "<<2*50=100>>100 <<100-40=60>>60 <<100*60/100=60>>60\n#### 60"),
        ("He has 66 hens and 22 cows, buys 22 each.", "<<66-44=22>>22 <<66+22=88>>88\n#### 88"),
    ],
)
def test_no_counterfactual_where_it_would_be_a_guess(question: str, solution: str) -> None:
    assert counterfactual(question, solution, Fraction(solution.rpartition("#### ")[2])) is None


def test_numbers_keep_their_commas() -> None:
    changed = counterfactual("A car of $1,200 and 16 wheels", "1200+16=<<1200+16=1216>>1216\n#### 1216", Fraction(1216))
    assert changed is not None and changed.question == "A car of $1,201 and 16 wheels"
