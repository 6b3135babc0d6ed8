r"""The values of a stored record as text: the questions, golds and steps that they say, or ValueError.

A value is never turned into text that it does not say. `["4"]`, `{"value": 4}`, `b"4"` and NaN are no golds, `12, 15`
is not 1215, and `"\frac{1}{2}"` in JSON is a form feed before `rac{1}{2}`: like many languages, JSON reads \f, \b, \t,
\n and \r as one control character.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from rl_soft.data.row import encodable, plain_number

EXPRESSION = "expression"  # of a stored row: a `number` kept as it is written, such as \frac{1}{2} or x^2 + 1

# What is left of the LaTeX commands that begin with t or n when \t and \n were read as a tab and a new line.
_TAB = "bf|binom|ext|extbf|extit|extrm|extstyle|extsuperscript|frac|herefore|heta|hickspace|ilde|imes|riangle"
_LINE = "abla|earrow|eg|eq|geq|gtr|leq|otin|subseteq|warrow"
_EATEN = re.compile(  # \x07 and \x0b are the \a and \v of other languages than JSON
    rf"[\x07\x08\x0b\x0c](?=[a-z])|\r(?=[a-z])|\t(?=(?:{_TAB})(?![a-z]))|\n(?=(?:{_LINE})(?![a-z]))"
)
# These may be words as well: they count in a text with LaTeX.
_EATEN_IN_LATEX = re.compile(r"\t(?=(?:an|anh|au|o|op)(?![a-z]))|\n(?=(?:exists|mid|ot|parallel|u)(?![a-z]))")
# In an answer no tab and no other control character is meant; a new line may be, unless a command is cut by it.
_NO_ANSWER = re.compile(
    rf"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)|\n(?=(?:{_LINE}|e|exists|i|mid|ot|parallel|u)(?![a-z]))"
)
_ESCAPES = {"\x07": r"\a", "\x08": r"\b", "\t": r"\t", "\n": r"\n", "\x0b": r"\v", "\x0c": r"\f", "\r": r"\r"}


def text_of(value: Any, column: str) -> str:
    """The text of a value: `""` for None, a number as it is written.

    Raises:
        ValueError: NaN, infinity, a list, an object, bytes or anything else that is no text; half a surrogate pair.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return encodable(value, column)
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float | Decimal):
        if math.isnan(value):
            raise ValueError(f"no {column}: NaN")
        if not math.isfinite(value) or (value and abs(Decimal(value).adjusted()) > 1000):
            raise ValueError(f"{column} is {value}, which is no number to write out")
        return f"{value:f}" if isinstance(value, Decimal) else str(value)
    raise ValueError(f"{column} is {_kind(value)}, not a text: {value!r:.80}")


def question_of(value: Any, column: str) -> str:
    """The text of a question; of chat messages that of the one message, which is the user's.

    Raises:
        ValueError: as `text_of`; true or false; no question; several messages; LaTeX without its backslashes.
    """
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value):
        value = _message(value, column)
    if isinstance(value, bool):
        raise ValueError(f"{column} is {str(value).lower()}, not a text")
    text = text_of(value, column)
    if not text.strip():
        raise ValueError(f"no {column}")
    _refuse_eaten(_EATEN.search(text), text, column)
    if "$" in text or "\\" in text:
        _refuse_eaten(_EATEN_IN_LATEX.search(text), text, column)
    return text.strip()


def _message(messages: list[dict[str, Any]], column: str) -> Any:
    roles = [m["role"] for m in messages]
    if roles != ["user"]:
        raise ValueError(
            f"{column} holds the messages {', '.join(map(str, roles))}, and a question is one message of the user; "
            "SoftGRPOTrainer takes longer chats, from Python"
        )
    content = messages[0].get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):  # [{type: text, text: ...}]
        content = content[0].get("text")
    return content


def gold_of(value: Any, column: str, answer_type: str | None) -> tuple[str, str]:
    r"""The gold answer in one form, and its type: `#### 1,234.0` -> `1234`, `The answer is: B.` -> `B`.

    Args:
        answer_type: one of `ANSWER_TYPES` or `expression`; None: a number if the answer is one, else free.

    Raises:
        ValueError: as `text_of`; no answer; one that is not of its type; a control character in it, unless it is code.
    """
    text = text_of(value, column)
    if not text.strip():
        raise ValueError(f"no {column}")
    if answer_type != "code":
        _refuse_eaten(_NO_ANSWER.search(text.rstrip()), text, column)
    text = text.strip()
    if answer_type is None:
        answer_type = "number" if _is_number(text) else "free"
    return _gold(text, answer_type), "number" if answer_type == EXPRESSION else answer_type


def _refuse_eaten(found: re.Match[str] | None, text: str, column: str) -> None:
    if found:
        character, at = found[0], found.start()
        name = _ESCAPES.get(character, repr(character))
        raise ValueError(
            f"{column}: the control character {name} before {text[at + 1 : at + 13]!r}, which a LaTeX command becomes "
            "when its backslash is not doubled in JSON"
        )


_BOOLEANS = {"true": "true", "yes": "true", "false": "false", "no": "false"}


def _gold(text: str, answer_type: str) -> str:
    if answer_type in ("free", "code", EXPRESSION):
        return text
    text = text.rpartition("####")[2].strip()
    if answer_type == "number":
        return plain_number(text)
    # One word, alone or behind "the answer is": the last word of "A or B" is no answer.
    word = re.sub(r"(?is)^.*\banswer(?:\s+is)?\b\s*:?", "", text).strip("()[]{}<>*.,:;!'\"`$ \n")
    if answer_type == "choice" and re.fullmatch("[A-Za-z]", word):
        return word.upper()
    if answer_type == "bool" and word.lower() in _BOOLEANS:
        return _BOOLEANS[word.lower()]
    raise ValueError(f"the answer {text!r} is not a {answer_type}")


def _is_number(text: str) -> bool:
    try:
        plain_number(text)
    except ValueError:
        return False
    return True


def steps_of(value: Any, column: str, split: Callable[[str], tuple[str, ...]]) -> tuple[str, ...]:
    """The steps of a worked solution: a text, which is split, or a list of texts and numbers.

    Raises:
        ValueError: as `text_of`; anything else, or a step that is missing, true or false.
    """
    if isinstance(value, str):
        return split(encodable(value, column))
    if isinstance(value, bool | int | float | Decimal):
        raise ValueError(f"{column} is {value}, neither a text nor a list of texts")
    if not isinstance(value, list | tuple):
        raise ValueError(f"{column} is {_kind(value)}, neither a text nor a list of texts: {value!r:.80}")
    steps = []
    for i, step in enumerate(value, 1):
        if step is None or isinstance(step, bool):
            raise ValueError(f"{column}: step {i} is {step}, not a text")
        steps.append(text_of(step, f"{column}: step {i}"))
    return tuple(steps)


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {list: "a list", tuple: "a list", dict: "an object", bytes: "bytes"}
    return kinds.get(type(value), f"a {type(value).__name__}")
