"""What it works out, and what it refuses before it would take long."""

import pytest

from syncline.envs.tools import ToolError
from syncline.envs.tools.calculator import calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2+3*4", "14"),
        ("(2+3)*-4", "-20"),
        ("7/2", "3.5"),
        ("7//2 + 7%2", "4"),
        ("2**10", "1024"),
        (" sqrt(81) ", "9.0"),
        ("max(1, 2, 3) - min(4, 5)", "-1"),
        ("round(2.567, 2)", "2.57"),
    ],
)
def test_works_out(expression: str, value: str):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1/0", "division by zero"),
        ("9**9**9**9", "too large"),
        ("99**9999", "too large"),
        ("round(5, -10**9)", "too large"),
        ("2.0**99999", "out of range"),
        ("(" * 150 + ")" * 150, "more than 200 characters"),
        ("(-8)**0.5", "not a real number"),
        ("__import__('os').getpid()", "not arithmetic"),
        ("x + 1", "'x' is not arithmetic"),
        ("'a' * 100", "not arithmetic"),
        ("True + 1", "not arithmetic"),
        ("[1][0]", "not arithmetic"),
        ("sqrt(-1)", "math domain error|expected a nonnegative"),
        ("2 +", "invalid syntax"),
    ],
)
def test_refuses_in_words(expression: str, words: str):
    with pytest.raises(ToolError, match=f"(?i){words}"):
        calculator(expression)
