"""The equations a text states, as a program: checked step by step, and run again with one number changed.

`48 / 2 = 24`, `<<48+24=72>>72` and `$3 × 4 = $12` are equations. An operand that is an earlier equation's result is
that result; one that is a number of the question is that number. So what a text would have answered, had the question
named another number, can be worked out without sampling again: a counterfactual of this text's own reasoning.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

MAX_CHARS = 120
"""Of an equation's left side; with plain operators alone a value cannot be much longer."""
MAX_LINE_CHARS = 1000
"""Searching takes the square of it where a line is nothing but an endless sum."""
_NUM = r"\d[\d,]*(?:\.\d+)?"
_TERM = rf"[(\t ]*-?\$?{_NUM}%?[)\t ]*"
_EQUATION = re.compile(
    rf"({_TERM}(?:[-+*/×÷x]{_TERM})+)=[\t ]*\$?(-?{_NUM})(?![\d.,]*\d)(?![\t ]*[-+*/×÷x][\t ]*[\d($])"
)
"""`5 + 3*4 = 5 + 12 = 17` states one result, 17: what an operator follows is no result."""
_GIVEN = re.compile(r"(?<![\d.,])\d[\d,]*(?:\.\d+)?(?![\d.]*\d)")
_OPERATORS: Mapping[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
)
_UNITS = frozenset(map(Fraction, (0, 1, 2, 3, 4, 7, 10, 12, 24, 30, 52, 60, 100, 365, 1000)))
"""Numbers that a solution may know without the question: days of a week, a half, percent."""
_CONSTANTS = frozenset(map(Fraction, (7, 12, 24, 30, 52, 60, 100, 365, 1000)))
"""Those of them that a result may equal by accident."""
_WORDS = ("five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_CHANGES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 20)


@dataclass(frozen=True, slots=True)
class Equation:
    left: ast.expr
    stated: Fraction
    decimals: int
    """Of the stated result: `10 / 3 = 3.33` is right."""

    @property
    def holds(self) -> bool:
        value = evaluate(self.left, lambda literal: literal)
        slack = Fraction(1, 2 * 10**self.decimals) if self.decimals else Fraction(0)
        return value is not None and abs(value - self.stated) <= slack


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """The question with one number changed, and what its answer becomes."""

    question: str
    old: Fraction
    new: Fraction
    answer: Fraction


def equations(text: str) -> list[Equation]:
    """In the order they stand. What only looks like one (`x = 3`, `5 = 5`) is not."""
    lines = (line[:MAX_LINE_CHARS] for line in text.replace("−", "-").splitlines())
    found = (_equation(left, right) for line in lines for left, right in _EQUATION.findall(line))
    return [one for one in found if one is not None]


def evaluate(node: ast.expr, read: Callable[[Fraction], Fraction]) -> Fraction | None:
    """The value with every literal replaced by `read(literal)`; `None` where something is divided by zero."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return read(Fraction(str(value)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = evaluate(operand, read)
            return None if value is None else -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = evaluate(left, read), evaluate(right, read)
            if a is None or b is None or (b == 0 and isinstance(op, ast.Div)):
                return None
            return _OPERATORS[type(op)](a, b)
    return None


def replay(program: Sequence[Equation], answer: Fraction, *, old: Fraction, new: Fraction) -> Fraction | None:
    """What the program arrives at when the question's `old` is `new`; `None` when no equation states `answer`."""
    values: dict[Fraction, Fraction] = {}
    final = None
    for equation in program:
        value = evaluate(equation.left, lambda literal: values.get(literal, new if literal == old else literal))
        if value is None:
            return None
        values[equation.stated] = value
        final = value if equation.stated == answer else final
    return final


def counterfactual(question: str, rationale: str, answer: Fraction) -> Counterfactual | None:
    """The first number of the question that can be changed so that the rationale, run again, gives another answer.

    A number qualifies when the question names it once and no other quantity shares its value. The rationale must be
    right, end in the answer and be traceable (`_is_traceable`); changed results must stay positive, and whole where
    they were. `None`: no number qualifies.
    """
    program = equations(" ".join(re.findall(r"<<(.*?)>>", rationale)) or rationale)
    if not program or program[-1].stated != answer or not all(equation.holds for equation in program):
        return None
    given = [(match, Fraction(match.group().rstrip(",").replace(",", ""))) for match in _GIVEN.finditer(question)]
    if not _is_traceable(program, {value for _, value in given}, question.lower()):
        return None
    taken = _UNITS | {equation.stated for equation in program}
    for match, old in given:
        if old in taken or sum(value == old for _, value in given) > 1:
            continue
        for new in (old + change for change in _CHANGES):
            changed = replay(program, answer, old=old, new=new)
            if changed is not None and changed != answer and _is_plausible(program, old, new):
                text = match.group().rstrip(",")
                rest = question[match.start() + len(text) :]
                told = question[: match.start()] + _written(new, like=text) + rest
                return Counterfactual(told, old, new, changed)
    return None


def _is_traceable(program: Sequence[Equation], given: set[Fraction], question: str) -> bool:
    """Whether every operand can only be what it is taken for: a number of the question (or so many percent of it), a
    unit, or one result. A rationale that rounds, or works in its head, has operands that come from nowhere."""
    spelt = {Fraction(5 + i) for i, word in enumerate(_WORDS) if word in question}
    known = given | {value / 100 for value in given} | _UNITS | spelt
    results: set[Fraction] = set()
    for equation in program:
        operands = {Fraction(str(node.value)) for node in ast.walk(equation.left) if isinstance(node, ast.Constant)}
        if (
            operands - known - results
            or operands & results & (given | spelt | _CONSTANTS)
            or equation.stated in results
        ):
            return False
        results.add(equation.stated)
    return True


def _is_plausible(program: Sequence[Equation], old: Fraction, new: Fraction) -> bool:
    """Every result stays positive, and a whole number if it was one."""
    for end in range(1, len(program) + 1):
        stated = program[end - 1].stated
        value = replay(program[:end], stated, old=old, new=new)
        if value is None or value <= 0 or (stated.denominator == 1 and value.denominator != 1):
            return False
    return True


def _written(value: Fraction, *, like: str) -> str:
    if value.denominator == 1:
        return f"{int(value):,}" if "," in like else str(value)
    return f"{float(value):.{len(like.partition('.')[2])}f}"


def _equation(left: str, right: str) -> Equation | None:
    plain = re.sub(r"(\d+(?:\.\d+)?)\s*%", r"(\1/100)", left.replace("$", "").replace(",", ""))
    plain = plain.replace("×", "*").replace("÷", "/").replace("x", "*").strip()
    plain = re.sub(r"(?<![\d.])0+(?=\d)", "", plain)
    while plain.startswith("(") and plain.count("(") > plain.count(")"):
        plain = plain[1:].strip()
    if len(plain) > MAX_CHARS:
        return None
    try:
        node = ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    stated = right.replace(",", "")
    return Equation(node, Fraction(stated), len(stated.partition(".")[2]))
