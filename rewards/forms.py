r"""The form of an answer: a list, set, tuple, union or interval with its members, an equation with its sides.

Every pattern is linear.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from rewards.numbers import read_number

# --- Lists, sides and names ------------------------------------------------------------------------------------------

_SEPARATOR = re.compile(
    r"\\[{}]|[()\[\]{}]|\\cup(?![A-Za-z])|(?:;|,(?!(?:[0-9]{2},){0,6}[0-9]{3}(?![0-9]))|\\lor(?![A-Za-z])"
    r"|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z]))\s*+(?:(?:or|and)(?![A-Za-z]))?"
)
_COMMA = re.compile(r",(?=(?:[0-9]{2},){0,6}[0-9]{3}(?![0-9]))")
_EQUALS = re.compile(r"(?<![<>!:=])=(?![=<>])|\\equiv(?![A-Za-z])")
# A name is anything without digits of its own: x_1, f(2), p+q, AB, P(A), Total, \angle ABC.
_LABELS = re.compile(r"(?:[A-Za-z]_?\{?[0-9]{1,3}\}?|[A-Za-z]\([^()]{0,20}\)|_\{[^{}]{0,20}\})")
_ARITHMETIC = re.compile(
    r"(?:[0-9\s.,+*/^(){}%!-]|x(?=\s?[0-9])|\\(?:times|cdots?|[ld]?dots|frac|div|sqrt|binom)(?![A-Za-z]))+"
)
_ASSIGNMENT = re.compile(
    r"(?:[A-Za-z]{1,2}(?:_\{?[A-Za-z0-9]{1,4}\}?)?(?:\([A-Za-z]\))?|\([A-Za-z](?:,\s?[A-Za-z]){1,5}\))\s?=(?![^=]*=)"
)
_MEMBERSHIP = re.compile(r"[A-Za-z]\s?\\in(?![A-Za-z])\s?")
_SPACING = re.compile(r"(?<![0-9])\s+|\s+(?![0-9\s])")


def split(answer: str, mark: str = "") -> list[str]:
    r"""The members of a list, or the parts of a union (mark `\cup`), split where no bracket is open."""
    members, depth, start = [], 0, 0
    for match in _SEPARATOR.finditer(answer):
        found = match.group()
        if found in (r"\{", "(", "[", "{"):
            depth += 1
        elif found in (r"\}", ")", "]", "}"):
            depth -= 1
        elif depth == 0 and (found == mark if mark or found == r"\cup" else True):
            members.append(answer[start : match.start()].strip())
            start = match.end()
    return [member for member in (*members, answer[start:].strip()) if member] or [answer]


_DERIVED = re.compile(r"[0-9]{1,9}\s?[A-Za-z]{1,2}|[A-Za-z]\^\{?[0-9]\}?(?:\s?[-+*/]?\s?[A-Za-z]\^\{?[0-9]\}?){1,3}")


def side(answer: str, prose: bool = False) -> str:
    r"""What an equation answers: 5 for `x = 5` and `2 + 3 = 5`, 16/3 for `16/3 \approx 5.33`; the equation where its
    left side is neither a name nor arithmetic (`x^2 - 5x + 6 = 0`); in prose also 6 for `2x = 6`."""
    exact, _, approximate = answer.partition(r"\approx")
    answer = exact if any(map(str.isdigit, exact)) else approximate or exact
    sides = [part.strip() for part in _EQUALS.split(answer)]
    if len(sides) == 1:
        return answer.strip()
    left, right = sides[-2:]
    if re.fullmatch(r"[A-Za-z]", right) and read_number(left):
        return left
    name = not re.search(r"[0-9]", _LABELS.sub("", left)) and not (right == "0" and re.search(r"[+-]", left))
    name = name or (prose and right != "0" and _DERIVED.fullmatch(left) is not None)
    return right if name or _ARITHMETIC.fullmatch(left) or read_number(left) else answer


def variable(answer: str) -> str:
    """The left side of an assignment, x for `x = 5`; empty if the answer is something else."""
    return match.group().rstrip("= ") if (match := _ASSIGNMENT.match(answer)) else ""


def value(answer: str) -> str:
    """The right side of an assignment or membership; the answer itself if it is something else."""
    match = _ASSIGNMENT.match(answer) or _MEMBERSHIP.match(answer)
    return answer[match.end() :].strip() if match else answer


def squeeze(answer: str) -> str:
    """The answer without white space, except between digits: 2 1/2 is not 21/2."""
    return _SPACING.sub("", answer)


# --- Intervals -------------------------------------------------------------------------------------------------------

_RELATION = r"(<=?|>=?|\\(?:leq?|geq?|lt|gt)(?:slant)?(?![A-Za-z]))"
_BOUNDED = re.compile(
    rf"(?:(?P<low>[^<>=\\A-Za-z]{{1,40}}|-?\\[a-z]{{3,5}}[^<>=]{{0,40}}?)\s?{_RELATION}\s?)?"
    rf"(?P<name>[A-Za-z](?:\([A-Za-z]\))?)\s?(?:{_RELATION}\s?(?P<high>[^<>=]{{1,60}}))?"
)
BUILDER = re.compile(r"\\\{\s?[A-Za-z](?:\s?\\in\s?\\mathbb\s?\{?R\}?)?\s?(?:\\mid|\||:)(?P<inside>.*)\\\}")


def intervals(answer: str) -> str:
    r"""`(-\infty,1)\cup(3,\infty)` for `x < 1 or x > 3`; `interval` of anything else."""
    members = split(answer)
    parts = [interval(member) for member in members]
    return r"\cup".join(parts) if len(parts) > 1 and all(map(str.__ne__, parts, members)) else interval(answer)


def interval(answer: str) -> str:
    r"""`[0,1)` for `0 \le x < 1`, the answer itself if it is no such inequality with one variable."""
    match = _BOUNDED.fullmatch(answer)
    if match is None or not (match["low"] or match["high"]):
        return answer
    low, high, first, second = match["low"], match["high"], match[2], match[4]
    directions = {relation.lstrip("\\")[0] in "<l" for relation in (first, second) if relation}
    if len(directions) > 1:
        return answer
    if directions == {False}:
        low, high, first, second = high, low, second, first
    closed = [bool(relation) and relation not in ("<", ">", r"\lt", r"\gt") for relation in (first, second)]
    left, right = (low or r"-\infty").strip(), (high or r"\infty").strip()
    return f"{'[' if closed[0] else '('}{left},{right}{']' if closed[1] else ')'}"


# --- Forms -----------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    bracket: str  # "" of a list, "{}" of a set, "()" "[)" .. of tuples and intervals
    members: list[str]


OPEN = ("(", "[", r"\{", r"\emptyset")
_BRACKETS = ((r"\{", r"\}"), ("{", "}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("]", "["))
_NAMES = {r"\{\}": "{}", "{}": "", "][": "()"}


def form(answer: str) -> Form:
    """A list, set, tuple or interval with its members; a single member if the answer is none of these."""
    answer = value(answer)
    union = split(answer, r"\cup") if r"\cup" in answer else []
    parts = [form(part) for part in union] if len(union) > 1 else []
    if parts and all(part.bracket == "{}" for part in parts):
        return Form("{}", [member for part in parts for member in part.members])
    members = split(answer)
    if len(members) == 1:
        for opening, closing in _BRACKETS:
            inside = answer[len(opening) : -len(closing)]
            whole = answer.startswith(opening) and answer.endswith(closing) and split(f"{inside},0")[-1] == "0"
            if whole and (opening != "{" or "," in inside):
                return Form(_NAMES.get(opening + closing, opening + closing), _expand(_split_inside(inside)))
    return Form("", _expand(members))


def _split_inside(inside: str) -> list[str]:
    """Members within brackets, where a comma before three digits separates too, unless others have a space behind."""
    if not re.search(r",\s", inside):
        inside = _COMMA.sub(", ", inside)
    return split(inside)


def _expand(members: Sequence[str]) -> list[str]:
    r"""The members with two for each that holds a `\pm`."""
    if not any(r"\pm" in member for member in members):
        return list(members)
    return [value(member).replace(r"\pm", sign).removeprefix("+").strip() for member in members for sign in ("+", "-")]
