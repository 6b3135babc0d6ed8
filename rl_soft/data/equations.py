"""A worked solution: its lines, and the equations in them that hold."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"[\d.(][\d.+*/()-]*[+*/-][\d.+*/()-]*=-?{_NUMBER}")
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SIGNS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def equations(text: str) -> tuple[str, ...]:
    """The equations in a sentence, without units, that hold exactly.

    `"6 days/week * 2 weeks/month = 12 days/month, so 12 months x £10 = £120"` -> `("6*2=12", "12*10=120")`.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})|[£$€¥]", "", text)
    text = re.sub(r"(?<=[\d)\s])[x×](?=[\s(\d])", "*", text).replace("÷", "/").replace("−", "-")
    text = re.sub(r"[^\W\d_]+(?:[/'-][^\W\d_]+)*", "~", text)  # words
    text = re.sub(r"/\s*~", "", text)  # "$185/day"
    text = re.sub(r"(?<=[\d%)])(?:\s*~)+", " ", text)  # units behind a number
    text = re.sub(r"(?<=[+*/=(-])\s*(?:~\s*)+(?=[\d(])", "", text)  # words between an operator and a number
    text = re.sub(r"\s*([+*/=()%-])\s*", r"\1", text)
    text = re.sub(r"(?<=\d)\(", "*(", text)
    # "85/250*100%=34%" holds without the signs, "220*40%=88" with them.
    readings = (text.replace("%", ""), re.sub(rf"({_NUMBER})%", r"(\1/100)", text))
    found = [tuple(e for e in _EQUATION.findall(reading) if holds(e)) for reading in readings]
    return max(found, key=len)


def holds(equation: str) -> bool:
    """Whether `left=number` is true, exactly."""
    left, _, right = equation.rpartition("=")
    try:
        return _value(ast.parse(left, mode="eval").body) == Fraction(right)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(str(value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


def lines_of(text: str) -> tuple[str, ...]:
    """Its lines, without the `#### answer` one."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("####"))
