r"""Whether an extracted answer is the gold one: exact for numbers, undecided (None) where it takes mathematics.

Numbers are compared as exact fractions, whatever their form: 1,234 and 1234.0, 1/2 and 0.5, 2 1/2 and 2.5, 1.5e3 and
1500. A number has to be answered by a number; an unevaluated expression (2+3, \sqrt{16}) is wrong, since it is often
the question. Units and currency are dropped, never converted. docs/rewards.md states the rules in full. Nothing is
evaluated here, and every pattern is linear: its repetitions are bounded, possessive, or followed by nothing that can
fail.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

ANSWER_TYPES = ("number", "choice", "bool", "free")
MAX_ANSWER = 1000  # characters; anything longer is not an answer
MAX_EXPONENT = 400  # 1e400 is a number, 1e999999999 is an attack
DECIMALS = 6  # places to which a prediction has to agree with a gold that cannot be written out

# --- Characters ------------------------------------------------------------------------------------------------------

_SPACES = "\xa0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_SYMBOLS = {
    **{"⁄": "/", "％": "%", "，": ",", "≈": r"\approx ", "≠": r"\ne ", "≤": r"\le ", "≥": r"\ge ", "×": r"\times "},
    **{"·": r"\cdot ", "⋅": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "°": r"^\circ "},
    **{"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "⅕": " 1/5 ", "⅖": " 2/5 ", "⅗": " 3/5 "},
    **{"⅘": " 4/5 ", "⅙": " 1/6 ", "⅚": " 5/6 ", "⅛": " 1/8 ", "⅜": " 3/8 ", "⅝": " 5/8 ", "⅞": " 7/8 "},
}
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("−–—‒‐‑﹣-", "-"),
        **dict.fromkeys(_SPACES, " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff"),  # zero width
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},  # full width
        **_SYMBOLS,
    }
)
_THIN_THOUSANDS = re.compile(r"(?<=[0-9])[\xa0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))")


def plain(text: str) -> str:
    """The text with typographic characters replaced by ASCII or LaTeX."""
    if not text.isascii():
        text = _THIN_THOUSANDS.sub("", text).translate(_CHARACTERS)
    return text.replace("{,}", ",")


_UNWRAP = re.compile(
    r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it)|mbox|emph|operatorname|boxed|fbox)\s?\{([^{}]*)\}"
)
_NOISE = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|big|Big|bigl|bigr)(?![A-Za-z])|(?<!\\)\\[!()\[\]]|[$€£¥₹]"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])")
_FRAC_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_THIN_COMMA = re.compile(r"(?<=[0-9]),\s?\\!\s?(?=[0-9])")
_DEGREES = re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})")


def _unwrapped(command: re.Match[str]) -> str:
    content = command[1].strip()
    return f" {content} " if len(content) > 1 else content  # sets a word apart from what it stands beside


@lru_cache(maxsize=4096)
def clean(answer: str) -> str:
    """An answer without what carries no meaning: LaTeX spacing, text commands, currency, markdown, final stops."""
    answer = plain(answer)
    if "\\" in answer:
        answer = _FRAC_STYLE.sub(r"\\frac", answer.replace(r"\$", "").replace(r"\%", "%"))
        for _ in range(3):  # nested text commands
            answer = _UNWRAP.sub(_unwrapped, answer)
        answer = _DEGREES.sub(" degrees ", _SPACE.sub(" ", _THIN_COMMA.sub(",", answer)))
    return _NOISE.sub("", answer).strip(" \t\r\n*_`'\"").rstrip(".,;:!?").strip()


# --- Numbers ---------------------------------------------------------------------------------------------------------

DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{2,3}){0,8},[0-9]{3}(?![0-9])|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
_TIMES_TEN = r"\s*+(?:\\times|\\cdot|\*|x)\s*+10\s?(?:\^|\*\*)\s?\{?\s?(?P<power>[-+]?[0-9]{1,9})\s?\}?"
_FRAC = re.compile(rf"\\frac\s?(?:\{{\s?(-?{DECIMAL})\s?\}}|([0-9]))\s?(?:\{{\s?(-?{DECIMAL})\s?\}}|([0-9]))")
_LITERAL = re.compile(
    r"(?P<sign>[-+]?)\s*+(?:"
    rf"(?:(?P<whole>[0-9]{{1,18}})\s)?\s*+(?P<top>{DECIMAL})\s?/\s?(?P<bottom>-?{DECIMAL})"
    rf"|(?P<mantissa>[0-9]{{1,3}}(?:\ [0-9]{{3}}){{1,8}}(?![0-9])(?:\.[0-9]++)?|{DECIMAL})"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]{{1,9}})(?![0-9])|{_TIMES_TEN})?\.?"
    r")(?:\s*+(?P<percent>%|per\s?cent(?:age)?\b|pct\b))?(?P<unit>.*+)",
    re.DOTALL,
)
_SCALE = re.compile(r"\s*(thousand|million|billion|trillion)\b")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_ATTACHED = "cm|mm|km|nm|kg|mg|ml|mL|lbs?|oz|ft|in|mi|k?mph|hrs?|min|sec|ms|am|pm|AM|PM|st|nd|rd|th|k?Hz|kWh?|degrees"
_EXPONENT = r"(?:\s?\^\s?\{?-?[0-9]\}?|[²³])?"
_UNIT = re.compile(
    rf"(?:(?:{_ATTACHED})|\s+(?:[A-Za-z]{{2,24}}|[msghLlJNWVAKCF]))(?![A-Za-z]){_EXPONENT}"
    rf"(?:\s*(?:[/*-]|\\cdot)?\s*[A-Za-z]{{1,24}}(?![A-Za-z]){_EXPONENT}){{0,6}}\s*"
)
_NOT_UNIT = re.compile(
    r"\b(?:pi|sqrt|sin|cos|tan|cot|csc|log|ln|exp|lim|mod|or|and|to|from|times|plus|minus|over|divided|if|than|not"
    r"|either|neither|nor|between|maybe|perhaps|possibly|hundred|squared|factorial)\b"
)


class Number(NamedTuple):
    value: Fraction  # of the digits: 50 for 50%
    percent: bool


@lru_cache(maxsize=4096)
def read_number(answer: str) -> Number | None:
    """The number that a cleaned answer spells, its unit dropped, or None if the answer is anything else."""
    if answer.startswith(("(", "{")) and answer.endswith((")", "}")):
        answer = answer[1:-1].strip()
    match = _LITERAL.fullmatch(_FRAC.sub(r" \1\2/\3\4 ", answer).strip())
    if match is None or len(answer) > MAX_ANSWER:
        return None
    unit, scale = match["unit"], 1
    if word := _SCALE.match(unit):
        unit, scale = unit[word.end() :], _SCALES[word[1]]
    if unit and (_UNIT.fullmatch(unit) is None or _NOT_UNIT.search(unit)):
        return None
    exponent = int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    if match["top"]:
        bottom = _decimal(match["bottom"])
        if bottom == 0:
            return None
        value = _decimal(match["whole"] or "0") + _decimal(match["top"]) / bottom
    else:
        value = _decimal(match["mantissa"]) * Fraction(10) ** exponent
    return Number((-value if match["sign"] == "-" else value) * scale, match["percent"] is not None)


def _decimal(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", ""))


def _agree(prediction: Number, gold: Number) -> bool:
    """Exact equality, after a percent sign on one side only was read both ways: 50% is 0.5, and 50 with its unit.

    A gold that is no short decimal (1/3, 1.6666666666666667) cannot be written out: agreement to six places will do.
    """
    value, target = prediction.value, gold.value
    values = {value}
    if prediction.percent != gold.percent:
        values.add(value / 100 if prediction.percent else value * 100)
    if target in values:
        return True
    rounded = round(target, DECIMALS)
    return rounded != target and rounded != 0 and rounded in {round(v, DECIMALS) for v in values}


# --- Comparison ------------------------------------------------------------------------------------------------------

_SEPARATOR = re.compile(
    r"[()\[\]{}]|(?:;|,(?!(?:[0-9]{2},){0,6}[0-9]{3}(?![0-9]))|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z]))"
    r"\s*+(?:(?:or|and)(?![A-Za-z]))?"
)
_EQUALS = re.compile(r"(?<![<>!:=])=(?![=<>])")
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")
_FUNCTIONS = frozenset(
    {"pi", "sqrt", "frac", "log", "ln", "exp", "inf", "infty", "cup", "cap", "mod", "cot", "sec", "csc"}
)
_FUNCTIONS |= {prefix + name for prefix in ("", "arc") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")}
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[a-z]{1,12}\*?\}(?:\{[lcr|]{1,20}\})?")
_ASSIGNMENT = re.compile(
    r"(?:[A-Za-z]{1,2}(?:_\{?[A-Za-z0-9]{1,4}\}?)?(?:\([A-Za-z]\))?|\([A-Za-z](?:,\s?[A-Za-z]){1,5}\))\s?=(?![^=]*=)"
)
_SPACING = re.compile(r"(?<![0-9])\s+|\s+(?![0-9\s])")
_TEXT = re.compile(r"[A-Za-z][A-Za-z' .-]*+")
CHOICE = re.compile(
    r"(?<![\w'])(A(?!\s(?!is\b|or\b|and\b|as\b|because\b|since\b|was\b)[a-z])|[B-HJ]|I(?=[).:]|\Z)"  # no article
    r"|(?<=\()[a-j](?=\)))(?![\w'])"
)
BOOL = re.compile(r"\b(?:yes|no|true|false)\b", re.IGNORECASE)


def _split(answer: str) -> list[str]:
    """The members of a list, split at commas, semicolons, "or" and "and" that stand outside brackets."""
    members, depth, start = [], 0, 0
    for match in _SEPARATOR.finditer(answer):
        mark = match.group()
        if mark in "([{":
            depth += 1
        elif mark in ")]}":
            depth -= 1
        elif depth == 0:
            members.append(answer[start : match.start()])
            start = match.end()
    return [member for member in (*members, answer[start:]) if member.strip()] or [answer]


def _side(answer: str) -> str:
    r"""What an equation ends in, 5 for `x = 5`, but before an approximation, 16/3 for `16/3 \approx 5.33`."""
    exact, _, approximate = answer.partition(r"\approx")
    return _EQUALS.split(exact if any(map(str.isdigit, exact)) else approximate or exact)[-1].strip()


def _variable(answer: str) -> str:
    """The left side of an assignment, x for `x = 5`; empty if the answer is something else."""
    return match.group().rstrip("= ") if (match := _ASSIGNMENT.match(answer)) else ""


def _value(answer: str) -> str:
    """The right side of an assignment; the answer itself if it is something else, such as an equation."""
    return answer[match.end() :].strip() if (match := _ASSIGNMENT.match(answer)) else answer


def _elements(answer: str) -> tuple[str, list[str]]:
    r"""(bracket, members) of `(1, 2)`, `\{1, 2\}` or `1, 2`; the bracket is empty for the last two, which are sets."""
    members = _split(answer)
    if len(members) == 1:
        for opening, closing, bracket in ((r"\{", r"\}", ""), ("{", "}", ""), ("(", ")", "("), ("[", "]", "[")):
            if answer.startswith(opening) and answer.endswith(closing):
                return bracket, _split(answer[len(opening) : -len(closing)])
    return "", members


def _is_text(answer: str) -> bool:
    """Whether the answer consists of words, none of them mathematical."""
    words = _WORD.findall(answer)
    return bool(words) and _TEXT.fullmatch(answer) is not None and _FUNCTIONS.isdisjoint(words)


def _squeeze(answer: str) -> str:
    """The answer without white space, except between digits: 2 1/2 is not 21/2."""
    return _SPACING.sub("", answer)


def _same_expression(prediction: str, gold: str) -> bool | None:
    """Whether two cleaned answers agree; None if it takes mathematics to tell."""
    if _squeeze(prediction) == _squeeze(gold):
        return True
    if (target := read_number(_value(gold))) is not None:
        # Every candidate has to be right, and a number.
        values = [read_number(_side(member)) for member in _split(prediction)]
        return all(value is not None and _agree(value, target) for value in values)
    if _is_text(gold):
        return prediction.casefold() == gold.casefold()
    if not (_FUNCTIONS | {"and", "or"}).issuperset(_WORD.findall(_ENVIRONMENT.sub("", prediction))):
        return False  # prose
    (bracket, members), (gold_bracket, gold_members) = _elements(_value(prediction)), _elements(_value(gold))
    if bracket == gold_bracket and len(gold_members) > 1:
        return _same_members(members, gold_members, ordered=bool(bracket))
    if len(members) > 1 and len(gold_members) == 1 and not bracket and r"\pm" not in gold:
        return False  # candidates for a single expression
    return None


def _same_members(members: Sequence[str], gold_members: Sequence[str], ordered: bool) -> bool | None:
    """Whether two lists agree member by member, or as sets; None if that takes mathematics."""

    def match(member: str, gold: str) -> bool | None:
        variables = {_variable(member), _variable(gold)} - {""}
        return False if len(variables) > 1 else _same_expression(_value(member), _value(gold))

    table = [[match(member.strip(), gold.strip()) for gold in gold_members] for member in members]
    if ordered:
        verdicts = [table[i][i] for i in range(len(members))] if len(members) == len(gold_members) else [False]
    else:
        verdicts = [_any(row) for row in (*table, *zip(*table, strict=True))]
    return False if False in verdicts else None if None in verdicts else True


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    verdicts = set(verdicts)
    return True if True in verdicts else None if None in verdicts else False


def same(prediction: str, gold: str, answer_type: str) -> bool | None:
    """Whether an extracted answer is the gold one; None if it takes mathematics to tell."""
    check_type(answer_type)
    if len(prediction) > MAX_ANSWER or not gold.strip():
        return False
    match answer_type:
        case "number":
            return _same_expression(clean(prediction), clean(gold))
        case "choice":
            return _letters(prediction) == _letters(gold) != ()
        case "bool":
            return _truths(prediction) == _truths(gold) != ()
    prediction, gold = clean(prediction), clean(gold)
    if (value := read_number(prediction)) is not None and (target := read_number(gold)) is not None:
        return _agree(value, target)
    return " ".join(prediction.casefold().split()) == " ".join(gold.casefold().split()) != ""


def _letters(answer: str) -> tuple[str, ...]:
    """The choices that an answer names, sorted: ("A", "C") for "(C) and (A)"."""
    answer = clean(answer)
    found = [match[1].upper() for match in CHOICE.finditer(answer)]
    if len(answer) == 1 and answer.isalpha():
        found = [answer.upper()]
    return tuple(sorted(set(found)))


def _truths(answer: str) -> tuple[bool, ...]:
    return tuple(sorted({match.group().lower() in ("yes", "true") for match in BOOL.finditer(answer)}))


def check_type(answer_type: str) -> None:
    if answer_type not in ANSWER_TYPES:
        nearest = difflib.get_close_matches(str(answer_type), ANSWER_TYPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"answer_type {answer_type!r} is not one of {ANSWER_TYPES}; the nearest is {nearest!r}")


def canonical(prediction: str, answer_type: str = "number") -> str:
    """A spelling that equal plain answers share (1,234.0 and 1234; (B) and b; yes and true), to count votes with."""
    check_type(answer_type)
    cleaned = clean(prediction)
    if answer_type == "choice":
        return "".join(_letters(prediction))
    if answer_type == "bool":
        return ", ".join(str(truth).lower() for truth in _truths(prediction))
    if (number := read_number(_side(cleaned))) is not None:
        return f"{number.value}%" if number.percent else str(number.value)
    return " ".join(cleaned.casefold().split()) if answer_type == "free" else _squeeze(cleaned)


def readable(gold: str, answer_type: str) -> bool | None:
    """Whether a completion could be compared with this gold answer; None if math-verify has to say."""
    check_type(answer_type)
    gold = clean(gold)
    match answer_type:
        case "choice":
            return _letters(gold) != ()
        case "bool":
            return len(_truths(gold)) == 1
        case "number" if gold and read_number(_value(gold)) is None and not _is_text(gold):
            return None
    return gold != ""
