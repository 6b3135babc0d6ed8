"""One problem, whatever data set it is from, and the side of the split that it stands on."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

ANSWER_TYPES = ("number", "choice", "bool", "free", "code")
SPLITS = ("train", "evaluation")
STEP_FORMS = ("text", "equations")


@dataclass(frozen=True)
class Row:
    """One problem."""

    id: str  # stable and unique; addresses the randomness of its rollouts
    question: str
    steps: tuple[str, ...]  # worked solution, one entry per step; () when there is none
    answer: str
    answer_type: str  # one of ANSWER_TYPES
    source: str
    family: str | None  # rows made from one template, or variants of one problem, share a family
    # JSON; what judges it besides the answer: of a reasoning-gym task its scorer's metadata; of a function to complete
    # (answer_type code) the `prompt` and the `entry_point`
    metadata: str = field(default="", repr=False)
    # every column of its record as the file has it, for the rewards; {} where it was generated
    columns: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)


def question_hash(question: str) -> str:
    """16 hex digits that do not depend on case or on the amount of white space."""
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).hexdigest()[:16]


def side_of(digest: str) -> str:
    """One question in ten is for evaluation."""
    return "evaluation" if int(digest, 16) % 10 == 0 else "train"


# Thousands in groups of three behind a first figure that is not 0: `12, 15`, `3,5` and `0,500` are no single numbers.
_NUMBER = re.compile(
    r"([-+]?)\s*\$?\s*([-+]?)((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)((?:[eE][-+]?\d+)?)\s*\$?"
)


def plain_number(text: str) -> str:
    """Exact plain decimal notation: `-1,200.50` -> `-1200.5`, `1e3` -> `1000`."""
    found = _NUMBER.fullmatch(text.strip().removeprefix("$").strip().replace("−", "-"))
    try:
        value = Decimal("".join(found.groups()).replace(",", "")) if found else Decimal("nan")
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or abs(value.adjusted()) > 1000:
        raise ValueError(f"the answer {text!r} is not a number")
    plain = f"{value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def encodable(text: str, where: str) -> str:
    """The text, if a tokenizer can read it: half a surrogate pair, or a byte of another encoding, is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: {text[error.start]!r} at {error.start} is no Unicode character") from None
    return text


def check(name: str, value: str, choices: Sequence[str]) -> str:
    """The value, if it is one of the choices; else raises ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value
