r"""What a completion answers and whether that is right: one extractor and one comparison for training and evaluation.

Three outcomes: `correct`, `wrong`, and `unparsed`: no answer was found, or the grader gave up on the one that was.
Reports keep the last two apart, because an unparsed answer is a question about the parser before it is one about the
model.

Extraction takes the first form that yields an answer: the last `\boxed{}`, the last `####`, the last "the answer is"
and, unless `strict`, the last number (letter, yes or no, line). Nothing before the last `</think>` is looked at.
`rewards.comparison` then decides what arithmetic can decide; math-verify, in a worker process (`rewards.symbolic`),
decides the rest.

Hedging: an answer is correct only if *every* candidate it lists is. Candidates belong to one list when only
punctuation and connectives stand between them, or when an "or" does, within a sentence. So "3 or 4",
`\boxed{3}, \boxed{4}` and `\boxed{3, 4}` are wrong for 3, while the numbers and boxes of a derivation do no harm: only
the last answer counts. docs/rewards.md states the rules in full.

Every pattern is linear in the text: its repetitions are bounded, possessive, or followed by nothing that can fail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rewards import symbolic
from rewards.comparison import (
    ANSWER_TYPES,
    BOOL,
    CHOICE,
    DECIMAL,
    MAX_ANSWER,
    canonical,
    check_type,
    clean,
    plain,
    read_number,
    readable,
    same,
)

Outcome = Literal["correct", "wrong", "unparsed"]
__all__ = ["ANSWER_TYPES", "Judgement", "Outcome", "canonical", "equal", "extract", "judge", "judge_many"]
__all__ += ["unreadable_golds"]


class Judgement(NamedTuple):
    outcome: Outcome
    prediction: str | None
    failure: symbolic.Failure | None = None  # why the grader gave up, if it did


# --- Extraction ------------------------------------------------------------------------------------------------------

_SMALL = r"[0-9]{1,18}"
_POWER = r"10\s?\^\s?\{?-?[0-9]{1,9}\}?"
_NUMBER = re.compile(
    r"(?:(?<![A-Za-z0-9_)\]}])-\s?(?=\\?[$€£¥₹]|\\[dtc]?frac|[.0-9]))?(?:\\?[$€£¥₹]-?)?(?<![A-Za-z0-9_])(?:"
    rf"\\[dtc]?frac\s?(?:\{{\s?-?{DECIMAL}\s?\}}|[0-9])\s?(?:\{{\s?-?{DECIMAL}\s?\}}|[0-9])|{_POWER}|{DECIMAL}(?:"
    rf"[eE][-+]?[0-9]{{1,9}}(?![0-9A-Za-z])|\s{{0,3}}(?:\\times|\*|x)\s{{0,3}}{_POWER}|\s?\\[dtc]?frac\{{{_SMALL}\}}\{{{_SMALL}\}}"
    rf"|\ {{1,3}}{_SMALL}/{_SMALL}(?![0-9])|\s?/\s?{DECIMAL})?"
    r")(?:\s(?:thousand|million|billion|trillion)\b)?(?:\s?\\?%|\spercent\b)?"
)
_CONNECTIVE = r"(?:or|and|either|both|maybe|perhaps|possibly|alternatively|otherwise|else|also)"
_GLUE = re.compile(
    rf"(?:[^\w=+*<>^-]|\*\*|\b(?:{_CONNECTIVE}|text|quad|qquad|is|it|be|could|might|answer|the)\b)*+", re.IGNORECASE
)
_LISTING = re.compile(rf"[,;/|&]|\b{_CONNECTIVE}\b", re.IGNORECASE)
_OR = re.compile(r"\b(?:or|alternatively|otherwise|maybe|perhaps|possibly)\b", re.IGNORECASE)
_STOP = re.compile(r"[.!?](?=\s|\Z)|\n")
_GAP = 60  # characters between two candidates of one list


class Span(NamedTuple):
    start: int
    end: int
    content: str


def _alternatives(gap: str) -> bool:
    r"""Whether the text between two answers makes them alternatives: that in `\boxed{3} or \boxed{4}`."""
    if len(gap) > _GAP:
        return False
    return _GLUE.fullmatch(gap) is not None or (_OR.search(gap) is not None and _STOP.search(gap) is None)


def _enumerated(gap: str) -> bool:
    """Whether the text between two bare candidates does: the same, within a sentence and with a separator. A `#` ends
    a list, since it announces what follows: steps like `7*3=1;1-4=3;#7` give one answer."""
    return _alternatives(gap) and "#" not in gap and _STOP.search(gap) is None and _LISTING.search(gap) is not None


def _join(spans: Sequence[Span]) -> Span:
    """Several candidates as one answer, `3, 4`; repetitions count once."""
    return Span(spans[0].start, spans[-1].end, ", ".join(dict.fromkeys(span.content for span in spans)))


def _last_run(text: str, spans: Sequence[Span], bare: bool = True) -> Span:
    """The last span with the spans before it that belong to the same list."""
    first, joined = len(spans) - 1, _enumerated if bare else _alternatives
    while first and joined(text[spans[first - 1].end : spans[first].start]):
        first -= 1
    return _join(spans[first:])


def _first_run(text: str, spans: Sequence[Span]) -> Span:
    """The first span with the spans after it that belong to the same list, as they also do in "The answer is 5 6"."""
    last = 0
    while last + 1 < len(spans):
        gap = text[spans[last].end : spans[last + 1].start]
        if not (gap.isspace() or _enumerated(gap)):
            break
        last += 1
    return _join(spans[: last + 1])


def _find(pattern: re.Pattern[str], text: str, start: int = 0, stop: int | None = None) -> list[Span]:
    matches = pattern.finditer(text, start, len(text) if stop is None else stop)
    return [Span(m.start(), m.end(), m.group().replace("\\$", "").replace("$", "").strip()) for m in matches]


_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s?(?:(\{)|([^\s{}\\$]{1,50}))|\\.|[{}]", re.DOTALL)


def boxes(text: str) -> list[Span]:
    r"""The outermost closed, non-empty `\boxed{...}`, in one pass over the braces."""
    found: list[Span] = []
    open_braces: list[re.Match[str] | None] = []  # a match opens a box, None is any other brace
    if "\\boxed" not in text and "\\fbox" not in text:
        return found
    for match in _BOX.finditer(text):
        if match[1]:
            open_braces.append(match)
        elif match[2]:
            found.append(Span(match.start(), match.end(), match[2]))
        elif match.group() == "{":
            open_braces.append(None)
        elif match.group() == "}" and open_braces and (opening := open_braces.pop()) is not None:
            while found and found[-1].start > opening.start():
                found.pop()
            inside = slice(opening.end(), min(match.start(), opening.end() + MAX_ANSWER + 1))
            if content := text[inside].strip():
                found.append(Span(opening.start(), match.end(), content))
    return found


_HASHES = re.compile(r"####[ \t]{0,9}([^\s#][^\n#]*+)")


def hashes(text: str) -> list[Span]:
    """The non-empty answers after `####`, each to the end of its line."""
    if "####" not in text:
        return []
    return [Span(match.start(), match.end(), match[1].strip()) for match in _HASHES.finditer(text)]


_STATEMENT = re.compile(r"\banswers?\b[^.\n:=0-9]{0,60}?(?:\b(?:is|are)\b(?!\s+not\b)|:|=)", re.IGNORECASE)
_OPENING = re.compile(r"(?:[\s:*$~]|\\[(\[])*+")
_LEAD = re.compile(
    r"(?:(?:approximately|about|around|roughly|exactly|equal\s+to|just|simply|only|therefore|thus|\\approx|[A-Za-z]\s?=)"
    r"[\s$]+)*+",
    re.IGNORECASE,
)
_CONTINUES = re.compile(
    r"\s*+(?:(?:[-+/^_<>=]|\*(?!\*))\s*+(?:[0-9\\({$-]|[A-Za-z](?![A-Za-z]))"
    r"|\\(?:pi|sqrt|frac|cdot|times|div|cup|cap|leq?|geq?|lt|gt|in|infty|ne|pm|approx|sin|cos|tan|log|ln|left|begin)"
    r"(?![A-Za-z]))"
    r"|[A-Za-z(\[]|:[0-9]"
)
_PROSE = re.compile(r"(?:\A|\s)(?!(?:or|and|pi|sqrt|sin|cos|tan|log|ln|mod)\b)[A-Za-z]{2,}")
_MATHEMATICAL = re.compile(r"[0-9\\=+^]")
_DELIMITER = re.compile(r"\$|\\[()\[\]]")


def _sentence_number(text: str, start: int, stop: int) -> Span | None:
    """The number or expression that a sentence opens with, else the last number in it."""
    start = _LEAD.match(text, start, stop).end()  # type: ignore[union-attr]
    numbers = _find(_NUMBER, text, start, stop)
    if numbers and numbers[0].start == start and not _CONTINUES.match(text, numbers[0].end, stop):
        return _first_run(text, numbers)
    sentence = text[start:stop]
    prose = _PROSE.search(sentence)
    expression = (sentence[: prose.start()] if prose else sentence).strip().rstrip("-,:;").strip()
    if expression and "boxed" not in expression and (prose is None or _MATHEMATICAL.search(expression)):
        return Span(start, start + len(expression), _DELIMITER.sub("", expression).strip())
    return _last_run(text, numbers) if numbers else None


def _stated(text: str, answer_type: str, start: int, limit: int) -> Span | None:
    """What the statement that ends at `start` gives as the answer."""
    start = _OPENING.match(text, start, limit).end()  # type: ignore[union-attr]
    limit = min(limit, start + MAX_ANSWER)
    stop = match.start() if (match := _STOP.search(text, start, limit)) else limit
    if answer_type == "number":
        return _sentence_number(text, start, stop)
    if answer_type == "free":
        content = text[start:stop].strip(" *$")
        return Span(start, stop, content) if content else None
    spans = _find(CHOICE if answer_type == "choice" else BOOL, text, start, stop)
    return _first_run(text, spans) if spans else None


def _statements(text: str, answer_type: str) -> list[Span]:
    """The answers of the last few "the answer is", each read up to the next."""
    spans: list[Span] = []
    limit = len(text)
    for match in reversed(list(_STATEMENT.finditer(text))[-20:]):
        if span := _stated(text, answer_type, match.end(), limit):
            spans.insert(0, span._replace(start=match.start()))
        limit = match.start()
    return spans


def _hashed(text: str, answer_type: str) -> list[Span]:
    """The answers after `####`; for a number without the words that may follow it on the line."""
    spans = hashes(text)
    if answer_type == "number":
        last = spans[-20:]
        read = [_sentence_number(text, text.index(span.content, span.start), span.end) for span in last]
        spans = [found._replace(start=span.start) if found else span for span, found in zip(last, read, strict=True)]
    return spans


def _with_neighbours(text: str, answer: Span, answer_type: str) -> Span:
    r"""A marked answer with the bare candidates that an "or" ties to it: `3 or \boxed{4}`, `#### 3, maybe 4`."""
    if answer_type == "free":
        return answer
    pattern = {"number": _NUMBER, "choice": CHOICE, "bool": BOOL}[answer_type]
    before = _find(pattern, text, max(0, answer.start - _GAP), answer.start)[-1:]
    after = _find(pattern, text, answer.end, answer.end + _GAP)[:1]
    beside = [
        *(span for span in before if _tied(text[span.end : answer.start])),
        answer,
        *(span for span in after if _tied(text[answer.end : span.start])),
    ]
    return _join(beside)


def _tied(gap: str) -> bool:
    return _alternatives(gap) and _OR.search(gap) is not None


# The lookahead is for money: "$5 and $6".
_FORMULA = re.compile(r"\$\$?([^$]{1,500})\$\$?(?![0-9])|\\\(([^$]{1,500}?)\\\)|\\\[([^$]{1,500}?)\\\]")


def _last_formula(text: str) -> Span | None:
    """The last formula of a text; prose between two dollar signs is none, unless it is the whole text."""
    for match in reversed(list(_FORMULA.finditer(text, max(0, len(text) - 3 * MAX_ANSWER)))):
        formula = next(filter(None, match.groups())).strip()
        if formula and (not _PROSE.search(formula) or match.group() == text.strip()):
            return Span(match.start(), match.end(), formula)
    return None


def _flexible(text: str, answer_type: str) -> str | None:
    """The answer of a text that does not mark one."""
    if answer_type == "free":
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
    if answer_type == "number":
        if len(whole := text.strip()) < 100 and read_number(clean(whole)):
            return whole
        spans = _find(_NUMBER, text)
        formula = _last_formula(text) if "$" in text or "\\" in text else None
        if formula and (not spans or spans[-1].end <= formula.end) and not _NUMBER.fullmatch(formula.content):
            return formula.content
        return _last_run(text, spans).content if spans else None
    if answer_type == "choice":
        spans = _find(CHOICE, text)
        if opening := re.match(r"\s*+\(?([A-Ja-j])\)?(?:[.):]|\s*+\Z|\n)", text):  # "(B) because A is wrong"
            return _first_run(text, spans).content if spans and spans[0].end <= opening.end() else opening[1]
        return _last_run(text, spans).content if spans else None
    spans = _find(BOOL, text)
    first = len(spans) - 1
    while first > 0 and not _STOP.search(text, spans[first - 1].end, spans[first].start):
        first -= 1  # to the opening of the last sentence that takes a side
    return _first_run(text, spans[first:]).content if spans else None


# --- The interface ---------------------------------------------------------------------------------------------------


_OUTCOMES: dict[bool | None, Outcome] = {True: "correct", False: "wrong", None: "unparsed"}


def extract(text: str, answer_type: str = "number", strict: bool = False) -> str | None:
    r"""The answer that a completion gives, as it is written there, or None.

    Args:
        text: the completion.
        answer_type: "number" (a number or an expression), "choice" (letters A to J), "bool", or "free" (text).
        strict: accept only an answer that is marked: `\boxed{}`, `####` or "the answer is".

    A hedged answer comes back as the list it is: "3, 4" for "The answer is 3 or 4".
    """
    check_type(answer_type)
    text = plain(text.rpartition("</think>")[2])
    answer: str | None = None
    if spans := boxes(text) or _hashed(text, answer_type) or _statements(text, answer_type):
        answer = _with_neighbours(text, _last_run(text, spans, bare=False), answer_type).content
    elif not strict:
        answer = _flexible(text, answer_type)
    return answer if answer and len(answer) <= MAX_ANSWER else None


def equal(prediction: str, gold: str, answer_type: str = "number") -> bool:
    """Whether an extracted prediction is the gold answer; False if the grader had to give up."""
    return _judge_predictions([prediction], [gold], [answer_type])[0].outcome == "correct"


def judge(text: str, gold: str, answer_type: str = "number", strict: bool = False) -> tuple[Outcome, str | None]:
    """The outcome of a completion, and the prediction that was extracted from it."""
    judgement = judge_many([text], [gold], [answer_type], strict)[0]
    return judgement.outcome, judgement.prediction


def judge_many(
    texts: Sequence[str], golds: Sequence[str], answer_types: Sequence[str], strict: bool = False
) -> list[Judgement]:
    """`judge` for a batch; the symbolic cases among them are decided in parallel."""
    predictions = [extract(text, kind, strict) for text, kind in zip(texts, answer_types, strict=True)]
    return _judge_predictions(predictions, golds, answer_types)


def _judge_predictions(
    predictions: Sequence[str | None], golds: Sequence[str], answer_types: Sequence[str]
) -> list[Judgement]:
    judgements: list[Judgement] = []
    undecided: dict[int, tuple[str, str]] = {}  # what takes mathematics, by position
    for i, (prediction, gold, answer_type) in enumerate(zip(predictions, golds, answer_types, strict=True)):
        verdict = None
        if prediction is not None:
            gold = _stated_gold(gold, answer_type)
            verdict = same(prediction, gold, answer_type)
            if verdict is None:
                undecided[i] = clean(prediction), clean(gold)
        judgements.append(Judgement(_OUTCOMES[verdict], prediction))
    for i, found in zip(undecided, symbolic.verify(list(undecided.values())), strict=True):
        if isinstance(found, bool):
            judgements[i] = judgements[i]._replace(outcome=_OUTCOMES[found])
        else:
            judgements[i] = judgements[i]._replace(failure=found)
    return judgements


def _stated_gold(gold: str, answer_type: str) -> str:
    """The answer in a gold column that holds a whole solution, as those of GSM8K and MATH do."""
    return extract(gold, answer_type, strict=True) or gold if "####" in gold or "\\boxed" in gold else gold


def unreadable_golds(golds: Sequence[str], answer_types: Sequence[str]) -> list[int]:
    """The positions of gold answers that no completion could be compared with: empty, or beyond the grader."""
    golds = [_stated_gold(gold, kind) for gold, kind in zip(golds, answer_types, strict=True)]
    verdicts = [readable(gold, kind) for gold, kind in zip(golds, answer_types, strict=True)]
    unreadable = [i for i, verdict in enumerate(verdicts) if verdict is False]
    undecided = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for start in range(0, len(undecided), 256):  # each part within the time limit of a batch
        part = undecided[start : start + 256]
        answers = symbolic.verify([(clean(golds[i]), clean(golds[i])) for i in part])
        unreadable += [i for i, verdict in zip(part, answers, strict=True) if verdict == "gold"]
    return sorted(unreadable)
