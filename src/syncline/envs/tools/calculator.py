"""Arithmetic that cannot run away: an expression is parsed, walked and bounded, never evaluated as Python."""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from syncline.envs.tools import ToolError

MAX_CHARS = 200
MAX_BITS = 4096
"""Of an integer result: about 1,200 digits."""
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.Pow: operator.pow,
    }
)


def _rounded(value: Any, *digits: Any) -> Any:
    """`round`, which works out the power of ten that an integer is rounded to."""
    if any(abs(count) > MAX_BITS for count in digits):
        raise ToolError("the value is too large")
    return round(value, *digits)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"sqrt": math.sqrt, "abs": abs, "round": _rounded, "min": min, "max": max, "log": math.log, "exp": math.exp}
)


def calculate(expression: str) -> int | float:
    """The value. Raises `ToolError` for what is no arithmetic, has no value, or is too large."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has more than {MAX_CHARS} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise error if isinstance(error, ToolError) else ToolError(str(error)) from error
    if isinstance(value, complex):
        raise ToolError("the value is not a real number")
    return value


def calculator(expression: str) -> str:
    """
    Works out an arithmetic expression: + - * / // % **, parentheses, sqrt, abs, round, min, max, log, exp.

    Args:
        expression: The expression, such as (3 + 4) * 12
    """
    return str(calculate(expression))


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(op, _value(left), _value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_value(argument) for argument in arguments))
    raise ToolError(f"{ast.unparse(node)!r} is not arithmetic this calculator knows")


def _bounded(op: ast.operator, left: Any, right: Any) -> Any:
    """The result, refused before it is worked out where it would be too large."""
    if isinstance(left, int) and isinstance(right, int):
        bits = {ast.Mult: left.bit_length() + right.bit_length(), ast.Pow: left.bit_length() * max(right, 0)}
        if bits.get(type(op), 0) > MAX_BITS:
            raise ToolError("the value is too large")
    return _BINARY[type(op)](left, right)
