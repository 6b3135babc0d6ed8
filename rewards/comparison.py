r"""Whether an extracted answer is the gold one: True, False, or what math-verify has to be asked.

Numbers are compared as exact fractions (`rewards.numbers`). A number has to be answered by a number; an unevaluated
expression (2+3, \sqrt{16}) is wrong, since it is often the question. Lists, sets, unions and intervals are compared by
their members. docs/rewards.md states the rules in full. Nothing is evaluated here, and every pattern is linear.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rewards.forms import BUILDER, OPEN, form, intervals, side, split, squeeze, value, variable
from rewards.numbers import MAX_ANSWER, Number, agree, read_number, repeats
from rewards.plain import clean, unset
from rewards.units import read_unit

ANSWER_TYPES = ("number", "choice", "bool", "free")
MAX_MEMBERS = 12  # of a list whose members take mathematics


class Ask(NamedTuple):
    """A pair for math-verify."""

    prediction: str
    gold: str


class Every(NamedTuple):
    parts: Sequence[Question]


class Some(NamedTuple):
    parts: Sequence[Question]


Question = bool | Ask | Every | Some


def pairs(question: Question) -> list[Ask]:
    """The pairs that a question hangs on."""
    if isinstance(question, Ask):
        return [question]
    return [] if isinstance(question, bool) else [pair for part in question.parts for pair in pairs(part)]


def resolve(question: Question, verdict_of: Callable[[Ask], bool]) -> bool:
    if isinstance(question, bool):
        return question
    if isinstance(question, Ask):
        return verdict_of(question)
    return (all if isinstance(question, Every) else any)(resolve(part, verdict_of) for part in question.parts)


def _every(parts: Sequence[Question]) -> Question:
    return False if False in parts else True if all(part is True for part in parts) else Every(parts)


def _some(parts: Sequence[Question]) -> Question:
    return True if True in parts else False if all(part is False for part in parts) else Some(parts)


# --- Words -----------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_FUNCTIONS = frozenset(
    {"pi", "sqrt", "frac", "log", "ln", "exp", "inf", "infty", "cup", "cap", "mod", "cot", "sec", "csc"}
)
_FUNCTIONS |= {prefix + name for prefix in ("", "arc") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
_SHORT_WORDS = frozenset(  # words that are no product of letters
    [
        "no",
        "yes",
        "odd",
        "all",
        "any",
        "one",
        "two",
        "six",
        "ten",
        "not",
        "and",
        "or",
        "is",
        "are",
        "was",
        "the",
        "for",
        "but",
        "if",
        "it",
        "its",
        "he",
        "she",
        "his",
        "her",
        "man",
        "men",
        "red",
        "sun",
        "mon",
        "tue",
        "wed",
        "thu",
        "fri",
        "sat",
        "may",
        "jan",
        "feb",
        "mar",
        "apr",
        "jun",
        "jul",
        "aug",
        "sep",
        "oct",
        "nov",
        "dec",
        "win",
        "tie",
        "cat",
        "dog",
        "an",
        "in",
        "on",
        "of",
        "to",
        "by",
        "at",
        "as",
        "so",
    ]
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,12}\*?\}(?:\{[lcr|]{1,20}\})?")
_TEXT = re.compile(r"[A-Za-z][A-Za-z' .-]*+")


def is_text(answer: str) -> bool:
    """Whether a cleaned answer consists of words, none of them mathematical: `no solution`, but not `ab`."""
    words = _WORD.findall(answer)
    if not words or _TEXT.fullmatch(answer) is None or not _FUNCTIONS.isdisjoint(words):
        return False
    return any(len(word) > 3 or word.istitle() or word.lower() in _SHORT_WORDS for word in words)


def _prose(answer: str) -> bool:
    words = set(_WORD.findall(_ENVIRONMENT.sub("", answer))) - _FUNCTIONS - {"and", "or"}
    return any(len(word) > 3 or word.lower() in _SHORT_WORDS for word in words)


_SET_UNIT = re.compile(
    r"(?:\\[,;:! ]|~|\s)*+\\(?:text|mathrm|mbox|textrm|textnormal)\s?\{([^{}]{1,40})\}(\s?\^\s?\{?[0-9]\}?)?\s*\Z"
)


def _without_unit(answer: str) -> str:
    r"""An expression without the unit behind it: `2\pi` for `2\pi \text{ cm}`."""
    if (
        (match := _SET_UNIT.search(answer))
        and match.start()
        and read_unit(re.sub(r"\\[,;:! ]|~", " ", match[1]).strip())
    ):
        return answer[: match.start()]
    head, _, unit = answer.rstrip(" $.").rpartition(" ")
    return head if head[-1:] in "})" and len(unit) > 1 and unit.isalpha() and head and read_unit(unit) else answer


# --- Comparison ------------------------------------------------------------------------------------------------------

_BASED = re.compile(
    r"([0-9A-Fa-f]{1,99})\s?(?:_\s?\{?\s?([0-9]{1,2}|[a-z]{3,9})\s?\}?|\(?\s?base\s+([0-9]{1,2}|[a-z]{3,9})\s?\)?)"
)


def _distinct(members: Sequence[str]) -> list[Number | None]:
    """The numbers of a list without those that say another again: in other units, or rounded."""
    numbers = list(dict.fromkeys(read_number(side(member)) for member in members))
    if len(numbers) > MAX_MEMBERS:
        return numbers
    kept: list[Number | None] = []
    for i, number in enumerate(numbers):
        others = numbers[:i] + ([] if number is None or number.unit else numbers[i + 1 :])
        if number is None or not any(other and repeats(number, other) and other != number for other in others):
            kept.append(number)
    return kept


def _same_expression(prediction: str, gold: str, nested: bool = False) -> Question:
    """Whether two cleaned answers agree."""
    if squeeze(prediction) == squeeze(gold):
        return True
    if based := _BASED.fullmatch(gold):
        found = _BASED.fullmatch(prediction)
        return found is not None and _digits(found) == _digits(based)
    if (target := read_number(side(gold))) is not None:
        if whole := read_number(prediction):
            return agree(whole, target)
        # Every candidate has to be right, and a number.
        members = split(prediction.removeprefix(r"\{").removesuffix(r"\}") if r"\{" in prediction else prediction)
        return all(value is not None and agree(value, target) for value in _distinct(members))
    if is_text(gold):
        return prediction.casefold() == gold.casefold()
    if _prose(prediction):
        return False
    return _same_form(prediction, gold) if not nested else Ask(_asked(prediction), gold)


def _digits(based: re.Match[str]) -> tuple[str, str]:
    words = {
        "two": "2",
        "three": "3",
        "four": "4",
        "five": "5",
        "six": "6",
        "seven": "7",
        "eight": "8",
        "nine": "9",
        "ten": "10",
    }
    base = based[2] or based[3]
    return based[1].lstrip("0").lower(), words.get(base, base)


def _asked(prediction: str) -> str:
    r"""A prediction as math-verify reads it best: with an exponent as a fraction, `2e-3` as `\frac{1}{500}`."""
    if (number := read_number(prediction)) is None or number.percent or not re.search(r"[eE^]", prediction):
        return prediction
    return rf"\frac{{{number.value.numerator}}}{{{number.value.denominator}}}"


def _same_form(prediction: str, gold: str) -> Question:
    prediction, gold = (m["inside"].strip() if (m := BUILDER.fullmatch(a)) else a for a in (prediction, gold))
    if prediction.startswith(OPEN) != gold.startswith(OPEN):
        prediction, gold = intervals(prediction), intervals(gold)
    ours, theirs = form(prediction), form(gold)
    parts, gold_parts = split(value(prediction), r"\cup"), split(value(gold), r"\cup")
    if len(gold_parts) > 1 and "{}" not in (ours.bracket, theirs.bracket):
        return len(parts) > 1 and _match(parts, gold_parts, ordered=False)
    if {ours.bracket, theirs.bracket} in ({"{}", "()"}, {"{}", "[]"}) and len(theirs.members) > 1:
        return False
    if ours.bracket.strip("{}") == theirs.bracket.strip("{}") and len(theirs.members) > 1:
        return _match(ours.members, theirs.members, ordered=theirs.bracket not in ("", "{}"))
    if len(ours.members) > 1 and len(theirs.members) == 1 and not ours.bracket:
        return False  # candidates for a single expression
    return Ask(_asked(prediction), gold)


def _match(members: Sequence[str], gold_members: Sequence[str], ordered: bool) -> Question:
    """Whether two lists agree member by member, or as sets."""

    def match(member: str, gold: str) -> Question:
        variables = {variable(member), variable(gold)} - {""}
        if len(variables) > 1:
            return False
        member, gold = value(member), value(gold)
        nested = re.match(r"\\\{|[(\[]", gold) is None
        return _same_expression(member, gold, nested)

    if ordered:
        return len(members) == len(gold_members) and _every(
            [match(*pair) for pair in zip(members, gold_members, strict=True)]
        )
    if max(len(members), len(gold_members)) > MAX_MEMBERS and not all(map(read_number, gold_members)):
        return Ask(", ".join(members), ", ".join(gold_members))
    table = [[match(member, gold) for gold in gold_members] for member in members]
    return _every([_some(row) for row in (*table, *map(list, zip(*table, strict=True)))])


# --- Letters, truth, text --------------------------------------------------------------------------------------------

BOOL = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)
_LETTER = re.compile(r"(?<![A-Za-z0-9'])([A-Z]|(?<=\()[a-z](?=\)))(?![A-Za-z0-9'])")
_LETTER_FIRST = re.compile(r"\W*([A-Za-z])\W*(?:\Z|[).:]|,? (?=because|since|as))")


def letters(answer: str) -> tuple[str, ...]:
    """The choices that an answer names, sorted: ("A", "C") for "(C) and (A)"."""
    answer = unset(answer)
    if match := re.fullmatch(r"\W*([A-Za-z])\W*", answer, re.ASCII):
        return (match[1].upper(),)
    return tuple(sorted({match[1].upper() for match in _LETTER.finditer(answer)}))


def truths(answer: str) -> tuple[bool, ...]:
    return tuple(sorted({match.group().lower() in ("yes", "true") for match in BOOL.finditer(answer)}))


def free(answer: str) -> str:
    return " ".join(clean(answer).casefold().split())


def same(prediction: str, gold: str, answer_type: str) -> Question:
    """Whether an extracted answer is the gold one, or what has to be asked to know."""
    check_type(answer_type)
    if len(prediction) > MAX_ANSWER or not gold.strip():
        return False
    match answer_type:
        case "number":
            if read_number(side(clean(gold))) is None:  # an expression, whose unit is known by how it is set
                prediction, gold = _without_unit(prediction), _without_unit(gold)
            return _same_expression(clean(prediction), clean(gold))
        case "choice":
            return letters(prediction) == letters(gold) != ()
        case "bool":
            return truths(prediction) == truths(gold) != ()
    if (value := read_number(clean(prediction))) is not None and (target := read_number(clean(gold))) is not None:
        return agree(value, target)
    return free(prediction) == free(gold) != ""


def check_type(answer_type: str) -> None:
    if answer_type not in ANSWER_TYPES:
        nearest = difflib.get_close_matches(str(answer_type), ANSWER_TYPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"answer_type {answer_type!r} is not one of {ANSWER_TYPES}; the nearest is {nearest!r}")


def canonical(prediction: str, answer_type: str = "number") -> str:
    """A spelling that equal plain answers share (1,234.0 and 1234; (B) and b; yes and true), to count votes with."""
    check_type(answer_type)
    cleaned = clean(prediction)
    if answer_type == "choice":
        return "".join(letters(prediction))
    if answer_type == "bool":
        return ", ".join(str(truth).lower() for truth in truths(prediction))
    if (number := read_number(side(cleaned))) is not None:
        return f"{number.value}%" if number.percent else str(number.value)
    return free(cleaned) if answer_type == "free" else squeeze(cleaned)


def readable(gold: str, answer_type: str) -> bool | None:
    """Whether a completion could be compared with this gold answer; None if math-verify has to say."""
    check_type(answer_type)
    gold = clean(gold)
    match answer_type:
        case "choice":
            return letters(gold) != ()
        case "bool":
            return len(truths(gold)) == 1
        case "number" if gold and read_number(side(gold)) is None and not is_text(gold):
            return None
    return gold != ""
