r"""The grammar of one number, which is read whole or not at all.

A number is an optional sign and currency, a literal (digits with separators of thousands, a decimal, a fraction, a
mixed number, a power of ten, a repeating decimal, words), an optional scale (dozen, million), a percent sign, and what
it counts: a unit of `rewards.units`, or plural words. Whatever else stands there makes it no number: `5!`, `5 pi`,
`1010_2`, `5 below zero`. Values are exact fractions. Every pattern is linear: its repetitions are bounded, possessive,
or followed by nothing that can fail.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rewards.units import CODES, CURRENCY, Unit, read_unit

MAX_ANSWER = 1000  # characters; anything longer is not an answer
MAX_EXPONENT = 400  # 1e400 is a number, 1e999999999 is an attack
TOLERANCE = Fraction(1, 10**6)  # relative, for golds that cannot be written out
FLOAT_DIGITS = 10  # a decimal of so many significant digits is a rounded number

_GROUPED = "|".join(rf"[0-9]{{1,3}}(?:{mark}[0-9]{{3}}){{1,8}}(?![0-9])" for mark in (r"\ ", "'", "_"))
DECIMAL = (
    r"(?:[0-9]{1,3}(?:\.[0-9]{3}){1,8},[0-9]{1,2}(?![0-9])|[0-9]{1,3}(?:\.[0-9]{3}){2,8}(?![0-9.,])"  # 1.234,56
    rf"|(?:[0-9]{{1,3}}(?:,[0-9]{{2,3}}){{0,8}},[0-9]{{3}}(?![0-9])|{_GROUPED}|[0-9]++)(?:\.[0-9]++)?|\.[0-9]++)"
)
_COMMA = re.compile(
    r"[0-9]{1,9},[0-9]{1,2}(?![0-9])"
)  # a decimal comma where a unit follows or a currency precedes it
POWER = r"10\s?(?:\^|\*\*)\s?\{?\s?(?P<power>[-+]?[0-9]{1,9})(?:\s?\})?"
_LITERAL = re.compile(
    rf"(?:(?P<whole>[0-9]{{1,18}})\s\s*+)?(?P<top>{DECIMAL})\s?/\s?(?P<bottom>-?{DECIMAL})"
    r"|(?P<fixed>[0-9]{0,18}\.[0-9]{0,18})(?:\\overline\s?\{?(?P<repeated>[0-9]{1,18})\}?|\((?P<period>[0-9]{1,18})\))"
    rf"|(?P<mantissa>{DECIMAL})(?:[eE](?P<exponent>[-+]?[0-9]{{1,9}})(?![0-9])|\s*+(?:\\times|\\cdot|\*|x)\s*+{POWER})?"
)
FRAC = re.compile(rf"\\frac\s?(?:\{{\s?(-?{DECIMAL})\s?\}}|([0-9]))\s?(?:\{{\s?(-?{DECIMAL})\s?\}}|([0-9]))")
_SIGN = re.compile(rf"(?P<sign>[-+]|(?i:negative\s|minus\s))?\s*+(?P<currency>{CURRENCY})?\s*+(?P<inner>[-+])?\s*+")
_GROUP = re.compile(r"([-+]?)\s?[({]([^(){},;]*+)[)}](?=([^)}]*+))\3", re.DOTALL)

# --- What follows the literal ----------------------------------------------------------------------------------------

_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALES |= {"lakh": 10**5, "lac": 10**5, "crore": 10**7, "score": 20, "gross": 144, "mn": 10**6, "bn": 10**9}
_LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
_ORDINALS = ["half", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh", "twelfth"]
_PARTS = {name: Fraction(1, n) for n, name in enumerate(_ORDINALS, 2)} | {
    "halve": Fraction(1, 2),
    "quarter": Fraction(1, 4),
}
_PARTS |= {"hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000), "twentieth": Fraction(1, 20)}
SCALE_WORDS = rf"(?:{'|'.join([*_SCALES, *_PARTS])})s?"
_SCALE = re.compile(rf"[\s-]*+((?i:{SCALE_WORDS}))(?![A-Za-z])|([kKMB])(?![A-Za-z0-9^])")
PERCENT = r"(?:\\?%|(?:per\s?cent(?:age)?(?:\s+points?)?|pct)(?![A-Za-z]))"
_PERCENT = re.compile(rf"\s*+{PERCENT}", re.IGNORECASE)
_NOUNS = re.compile(r"\s+[A-Za-z]{2,24}(?:[\s-]{1,3}[A-Za-z]{1,24}){0,8}|\s+times(?: as (?:many|much))?")
_PLURAL = re.compile(
    r"[a-z]{2,}(?<![sui])s\b|\b(?:people|persons?|men|women|children|feet|teeth|mice|geese|fish|sheep|deer)\b"
)
# Words that make something else of the number before them.
NOT_COUNTED = re.compile(
    r"\b(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi"
    r"|chi|psi|omega|infinity|inf|infty|sqrt|root|sin|cos|tan|cot|csc|sec|log|ln|exp|lim|mod|modulo|rem|remainder|squares?d"
    r"|squared|cubed|factorial|choose|power|plus|minus|times|over|divided|multiplied|by|or|and|to|from|if|unless|when|but"
    r"|than|more|less|fewer|greater|above|below|under|beyond|not|no|nor|never|isn|is|are|was|wrong|incorrect|false|either"
    r"|neither|both|between|maybe|perhaps|possibly|half|halves|zero|one|two|three|four|five|six|seven|eight|nine|ten|base"
    r"|hundred|thousand|million|billion|dozen|negative|approximately|about|at|least|most|so|fails|works|does|has|equals|gives|makes|exists|holds|remains|seems|x|y|z)\b",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"(?:\s+(?:each|left|remaining|altogether|total|in\s+(?:total|all|each)|apiece|old|away|ago|long|wide|tall|high|deep"
    r"|an?\s+(?:day|week|month|year|hour|minute|piece|person)))++\s*+\Z"
)


_FURTHER = re.compile(r"\A(?:more|extra|additional|other|further)\s+(?=[a-z]{3})(?!.*\bthan\b)")


class Number(NamedTuple):
    value: Fraction  # of the digits: 50 for 50%
    percent: bool = False
    unit: Unit | None = None
    rounded: bool = False  # written with as many digits as a float has


class _Tail(NamedTuple):
    scale: Fraction
    percent: bool
    unit: Unit | None
    bare: bool  # nothing stands there


@lru_cache(maxsize=4096)
def _tail(text: str, one: bool = False) -> _Tail | None:
    """What the text after a literal says; None if it is anything but a scale, a percent sign and a unit or plural.

    After a `one` the noun may be in the singular.
    """
    scale, bare = Fraction(1), not text.strip()
    while match := _SCALE.match(text):
        word = (match[1] or "").lower()
        known = _SCALES | _PARTS
        scale *= _LETTERS[match[2]] if match[2] else known[word if word in known else word[:-1]]
        text = text[match.end() :]
    if percent := _PERCENT.match(text):
        text = text[percent.end() :]
    shown = _ASIDE.sub("", text).strip()
    if shown.startswith("of ") and scale != 1:
        shown = shown[3:]
    if not shown.endswith("than"):
        shown = _FURTHER.sub("", shown)
    if not shown or (unit := read_unit(shown)) is not None:
        attached = re.match(r"[A-Za-z](?![A-Za-z])(?!\s?\^)", text)  # 5m: a product
        return None if attached else _Tail(scale, bool(percent), unit if shown else None, bare)
    counted = text[:1].isspace() and _NOUNS.fullmatch(f" {shown}") is not None
    if counted and not shown.startswith("times"):
        counted = NOT_COUNTED.search(shown) is None and (one or _PLURAL.search(shown) is not None)
    return _Tail(scale, bool(percent), None, False) if counted else None


# --- Words -----------------------------------------------------------------------------------------------------------

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
_WORDS = {word: n for n, word in enumerate(f"{_ONES} eighteen nineteen".split())} | {"a": 1, "an": 1}
_TENS = {
    word: 10 * n
    for n, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_WORDS |= _TENS
_SPELLED = re.compile(
    rf"(?:(?:{'|'.join([*_WORDS, 'hundred', 'thousand', 'million', 'billion', 'and'])})(?![A-Za-z])[\s-]*+){{1,16}}",
    re.I,
)


def _from_words(text: str) -> str:
    """The text with the number that it begins with in digits: `12 apples` for `twelve apples`."""
    match = _SPELLED.match(text)
    if match is None:
        return text
    total = current = 0
    words = re.findall(r"[a-z]+", match.group().lower())
    if words[-1] == "and" or words[0] == "and" or (words in (["a"], ["an"]) and not _SCALE.match(text[match.end() :])):
        return text
    last = 1000  # the value of the word before, to refuse "five five"
    for word in words:
        if word in _WORDS:
            if last < 20 or (last < 100 and _WORDS[word] > 9):
                return text
            last = _WORDS[word]
            current += last
        elif word != "and":
            last = 1000
            scale = _SCALES[word]
            current = max(current, 1) * scale
            if scale > 100:
                total, current = total + current, 0
    return f"{total + current} {text[match.end() :]}"


# --- The number ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def read_number(answer: str) -> Number | None:
    """The number that a cleaned answer is, with its unit, or None if the answer is anything else."""
    if len(answer) > MAX_ANSWER:
        return None
    answer = FRAC.sub(r" \1\2/\3\4 ", answer).strip() if "\\" in answer else answer
    if answer.startswith(("(", "{", "-(", "-{", "- (")) and (group := _GROUP.match(answer)):
        answer = group[1] + group[2].strip() + answer[group.end(2) + 1 :]
    start = _SIGN.match(answer)
    assert start
    if (code := start["code"]) and code not in CODES:
        return None
    negative = (start["sign"] or "+").lower() in ("-", "negative ", "minus ")
    if start["inner"]:
        if start["sign"]:
            return None
        negative = start["inner"] == "-"
    rest = answer[start.end() :]
    if start["currency"] and (group := _GROUP.match(rest)):  # \euro{5}
        rest = group[1] + group[2].strip() + rest[group.end(2) + 1 :]
    if rest[:1].isalpha():
        rest = _from_words(rest)
    comma = _COMMA.match(rest)
    if comma and (start["currency"] or ((tail := _tail(rest[comma.end() :])) and not tail.bare)):
        rest = rest.replace(",", ".", 1)
    match = _LITERAL.match(rest)
    if match is None or (tail := _tail(rest[match.end() :].removeprefix("."), match.group() == "1")) is None:
        return None
    value = _value(match)
    if value is None:
        return None
    digits = (match["mantissa"] or "").lstrip("0.")
    rounded = "." in (match["mantissa"] or "") and sum(map(str.isdigit, digits)) >= FLOAT_DIGITS
    value = -value if negative else value
    return Number(value if tail.scale == 1 else value * tail.scale, tail.percent, tail.unit, rounded)


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a literal; None if it has none or is too large to write out."""
    if match["top"]:
        bottom = _decimal(match["bottom"])
        return _decimal(match["whole"] or "0") + _decimal(match["top"]) / bottom if bottom else None
    if match["fixed"]:
        period, places = match["repeated"] or match["period"], len(match["fixed"].partition(".")[2])
        return _decimal(match["fixed"] + "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
    exponent = int(match["exponent"] or match["power"] or 0)
    if abs(exponent) > MAX_EXPONENT:
        return None
    value = _decimal(match["mantissa"])
    return value * Fraction(10) ** exponent if exponent else value


_SEPARATORS = str.maketrans("", "", ", '_")


def _decimal(digits: str) -> Fraction:
    if digits.isdecimal():
        return Fraction(int(digits))
    whole, comma, places = digits.rpartition(",")
    if (comma and "." in whole) or digits.count(".") > 1:  # 1.234,56 and 1.234.567
        digits = whole.replace(".", "") + "." + places if comma else digits.replace(".", "")
    return Fraction(digits.translate(_SEPARATORS) or "0")


def agree(prediction: Number, gold: Number) -> bool:
    """Exact equality, after a percent sign on one side only was read both ways: 50% is 0.5, and 50 with its unit.

    Units are converted where both sides have one of the same dimension, and dropped otherwise. A gold that cannot be
    written out (1/3, 1.6666666666666667) is matched by a decimal up to a relative difference of 1e-6.
    """
    value, target = prediction.value, gold.value
    if prediction.unit and gold.unit and prediction.unit.dimension == gold.unit.dimension:
        value, target = value * prediction.unit.factor, target * gold.unit.factor
    values = {value}
    if prediction.percent != gold.percent:
        values.add(value / 100 if prediction.percent else value * 100)
    if target in values:
        return True
    inexact = gold.rounded or (finite(prediction.value) and not finite(target))
    return inexact and any(abs(v - target) <= TOLERANCE * abs(target) for v in values)


def finite(value: Fraction) -> bool:
    """Whether a fraction can be written as a decimal."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def repeats(number: Number, other: Number) -> bool:
    """Whether a number says again what another says: its value, in other units or rounded to two places or more."""
    if agree(number, other):
        return True
    if number.percent or (number.unit != other.unit and number.unit and other.unit):
        return False
    return any(number.value == round(other.value, places) and not finite(other.value) for places in (2, 3, 4, 5, 6))
