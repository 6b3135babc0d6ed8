r"""Where the answer of a completion stands. `rewards.answers` judges it; docs/rewards.md states the rules in full.

The first form that yields an answer counts: the last `<answer>...</answer>`, the last `\boxed{}`, the last `####`, the
last "the answer is" and, unless `strict`, the last sentence that holds a number (letter, yes or no; the last line).
Nothing before the last `</think>` is looked at, nor anything where a `<think>` is not closed.

Every pattern is linear in the text: its repetitions are bounded, possessive, or followed by nothing that can fail.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rewards import choices
from rewards.comparison import (
    check_type,
)
from rewards.numbers import MAX_ANSWER, read_number
from rewards.plain import clean, plain, unset
from rewards.sentences import ALTERNATIVE, OR, PROSE, Reading, alternatives, items, open_formulas, read, stop
from rewards.units import read_unit


class Span(NamedTuple):
    start: int
    end: int
    content: str | None  # None where what stands there answers nothing


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


_HASHES = re.compile(r"####[ \t]{0,9}([^\s#](?:(?!\s#|####)[^\n])*+)")


def hashes(text: str) -> list[Span]:
    """The non-empty answers after `####`, each to the end of its line."""
    if "####" not in text:
        return []
    return [Span(match.start(), match.end(), match[1].strip()) for match in _HASHES.finditer(text)]


_STATEMENT = re.compile(
    r"\banswers?\b([^.\n:=0-9—]{0,60}?)(?:\b(?:is|are|was|were|be|equals)\b(?!\s+not\b|n't)|[:=]|—|\s-(?=\s))",
    re.IGNORECASE,
)


_CORRECTION = re.compile(
    r"(?:\b(?:wait|actually|correction|sorry|oops|scratch\s+that|I\s+mean|on\s+second\s+thoughts?|let\s+me\s+correct(?:\s+that)?)|,\s*no\b|\bno)\b(?:[,:]\s*(?=[-$0-9\\])|(?<!no)\s+(?=[-$0-9\\])"
    r"|[^\n]{0,60}?\b(?:it\s+is|it's|that\s+is|that's|should\s+be|must\s+be|make\s+(?:it|that)|I\s+mean)\b(?=\s+[^\sA-Za-z]))",
    re.IGNORECASE,
)


_DOUBT = re.compile(
    r"\b(?:not|n't|doubt\w*|unlikely|false|wrong|untrue|nor|never|impossible|no\s+way)\b|n't\b", re.IGNORECASE
)


_OPENING = re.compile(
    r"(?:[\s:*$~—\"'`]|[=-]>|\\to(?![A-Za-z])|\\Rightarrow(?![A-Za-z])|\\[(\[]|-(?=\s+[^\s0-9])|(?<=\n)[-*•]\s)*+"
)


_LEAD = re.compile(
    r"(?:(?:approximately|about|around|roughly|equal\s+to|given\s+by|just|(?!(?:near|hard|bare|scarce|certain|definite)ly)[a-z]{2,12}ly|therefore"
    r"|thus|indeed|now|still|then|both|either|the\s+(?:number|value|expression|interval|set|point|pair)|\\approx|negative|minus|[A-Z]{3}"
    r")[\s:$,]+)*+[\s$(\[\"'~]*+",
    re.IGNORECASE,
)


def _sentence_answer(text: str, verb: bool) -> Reading:
    """The answer of a statement whose words begin a text: what its sentence opens with, else, behind a `verb`, the
    last number of the sentence. Not `found` where only what follows can tell."""
    end = stop(text, 0, MAX_ANSWER)
    while alternative := ALTERNATIVE.match(text, end):  # "3. Or 4."
        end = stop(text, alternative.end())
    sentence = re.sub(r"\A-\s+(?=[0-9])", "-", text[:end])
    reading = read(sentence, opening=True)
    if not reading.found:
        spelled = read_number(whole := clean(sentence)) is not None
        return Reading(whole if spelled else None, spelled, 0)
    if (lead := _LEAD.match(sentence)) and lead.end() >= reading.first:
        return reading
    # After "is" unknown words make no number known: only a clause, an equation or what is called the result has one.
    last = read(sentence)
    clause = (
        _CLAUSE.match(sentence)
        or _RESULTING.search(sentence, 0, last.last + (sentence[last.last :][:1] == "("))
        or (last.text and "=" in sentence)
    )
    if verb and not clause and not last.spoiled:
        last = last._replace(text=None if read_number(clean(sentence)) else sentence.strip()[:200], spoiled=True)
    return last._replace(found=verb and last.text is not None and not last.spoiled)


_CLAUSE = re.compile(r"that\s|(?:he|she|it|they|we|there|this|I|you)\s", re.IGNORECASE)


_RESULTING = re.compile(
    r"(?:\bi\.e\.,?|\b(?:which|that|it)\s+(?:is|equals|gives|makes),?|\bnamely|\bor|\(|,)\s*\Z", re.IGNORECASE
)


def _stated(text: str, answer_type: str, start: int, limit: int, verb: bool) -> Reading:
    """What the statement that ends at `start` gives as the answer."""
    if answer_type == "number":
        region = text[start:limit]
        opened = open_formulas(region[: 2 * MAX_ANSWER])
        opening = _OPENING.match(opened)
        reading = _sentence_answer(opened[opening.end() if opening else 0 :], verb)
        if reading.found:
            return reading
        rest = _last_number(region[stop(region, opening.end() if opening else 0) + 1 :] if verb else region)
        return (
            rest if rest.found or not verb else reading._replace(found=reading.spoiled or reading.first < len(opened))
        )
    start = _OPENING.match(text, start, limit).end()  # type: ignore[union-attr]
    end = stop(text, start, min(limit, start + MAX_ANSWER))
    if answer_type == "free":
        content = text[start:end].strip(" *$\"'`") or None
    else:
        content = (choices.letter if answer_type == "choice" else choices.truth)(text[start:end], True)
    return Reading(content, content is not None, 0)


def _statements(text: str, answer_type: str) -> list[Span]:
    """The answers of the last few "the answer is", each read up to the next."""
    spans: list[Span] = []
    limit = len(text)
    for match in reversed(list(_STATEMENT.finditer(text))[-20:]):
        before = text[max(0, match.start() - 60) : match.start()]
        clause = re.split(r"[,;.!?\n]", before)[-1]
        if _DOUBT.search(clause) or _DOUBT.search(match[1]) or "cannot" in match[1]:
            continue
        verb = match.group()[-1].isalpha()
        reading = _stated(text, answer_type, match.end(), limit, verb)
        if reading.found:
            found = text.find(reading.text, match.end(), limit) if reading.text else -1
            end = found + len(reading.text or "") if found >= 0 else stop(text, match.end(), limit)
            spans.insert(0, Span(match.start(), end, reading.text))
        limit = match.start()
    return spans


def _hashed(text: str, answer_type: str) -> list[Span]:
    """The answers after `####`; for a number without the words that may follow it on the line."""
    spans = hashes(text)
    if answer_type == "number":
        for i, span in enumerate(spans[-20:], max(0, len(spans) - 20)):
            content = open_formulas((span.content or "")[:MAX_ANSWER])
            if read_number(clean(content)) is None and items(content):
                spans[i] = span._replace(content=_sentence_answer(content, True).text)
    return spans


def _boxed(text: str, answer_type: str) -> list[Span]:
    """The boxes; a number with the unit that stands behind its box."""
    spans = boxes(text)
    if answer_type == "number" and spans:
        behind = re.compile(r"(?:\$|\s|\\text\s?\{\s?)*([A-Za-z]{2,12})(?![A-Za-z])").match(text, spans[-1].end)
        if behind and read_unit(behind[1]) and read_number(clean(spans[-1].content or "")):
            spans[-1] = spans[-1]._replace(end=behind.end(), content=f"{spans[-1].content} {behind[1]}")
    return spans


def _join(spans: Sequence[Span]) -> Span:
    """Several candidates as one answer, `3, 4`; repetitions count once."""
    contents = [span.content for span in spans if span.content]
    return Span(spans[0].start, spans[-1].end, ", ".join(dict.fromkeys(contents)) or None)


def _last_run(text: str, spans: Sequence[Span]) -> Span:
    """The last span with the spans before it that belong to the same list."""
    first = len(spans) - 1
    while first and alternatives(text[spans[first - 1].end : spans[first].start]):
        first -= 1
    return _join(spans[first:])


_GAP = 60


def _with_neighbours(text: str, answer: Span, answer_type: str) -> Span:
    r"""A marked answer with the bare candidates that an "or" ties to it: `3 or \boxed{4}`, `#### 3, maybe 4`."""
    if answer_type == "free" or answer.content is None:
        return answer
    left, right = text[max(0, answer.start - _GAP) : answer.start], text[answer.end : answer.end + _GAP]
    if not OR.search(left) and not OR.search(right):
        return answer
    reader: Callable[[str], Sequence] = items if answer_type == "number" else choices.names(answer_type)
    spans = [answer]
    if (before := reader(left)) and _tied(left[before[-1].end :]):
        spans.insert(0, Span(0, answer.start, before[-1].text))
    if (after := reader(right)) and _tied(right[: after[0].start]) and not answer.content.endswith(after[0].text):
        spans.append(Span(0, answer.end, after[0].text))
    return _join(spans)


def _tied(gap: str) -> bool:
    return alternatives(gap) and OR.search(gap) is not None


_DISPLAY = re.compile(r"\$\$([^$]{1,500})\$\$|\\\[([^$]{1,500}?)\\\]|\$([^$]{1,500})\$(?![0-9])")


_TAIL = 3000  # characters in which an unmarked answer is looked for


def _last_number(text: str) -> Reading:
    """The number or expression that a text without marks ends in."""
    text = text[-_TAIL:]
    if "$" in text or "\\[" in text:
        formulas = list(_DISPLAY.finditer(text))
        if formulas and (formula := formulas[-1]) and ("\n" in formula.group() or "\\begin" in formula.group()):
            content = next(filter(None, formula.groups())).strip()
            if not items(open_formulas(text[formula.end() :])) and items(content):
                return Reading(content, True, 0)
    lines = text.split("\n")
    while lines:
        line = lines.pop()
        while lines and ALTERNATIVE.match(f"\n{line}"):
            line = f"{lines.pop()}\n{line}"
        for sentence in reversed(_sentences(open_formulas(line))):
            reading = read(_BULLET.sub("", sentence))
            if reading.found and not sentence.endswith("?"):
                return reading
    return Reading(None, False, 0)


_BULLET = re.compile(r"\A\s*+(?:[-*•]\s+|(?:[=-]>|\\to(?![A-Za-z])|\\Rightarrow(?![A-Za-z]))\s*)")


def _sentences(text: str) -> list[str]:
    """The sentences of a text; one that only offers an alternative belongs to that before it."""
    found, start = [], 0
    while start < len(text):
        end = stop(text, start)
        while alternative := ALTERNATIVE.match(text, end):
            end = stop(text, alternative.end())
        if text[start:end].strip():
            found.append(text[start : end + 1].rstrip("\n"))
        start = end + 1
    return found


_NO_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s?(?:\{\s?\}?)?")


def _flexible(text: str, answer_type: str) -> str | None:
    """The answer of a text that does not mark one."""
    if answer_type == "free":
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
    if "\\boxed" in text or "\\fbox" in text:  # empty, or never closed
        text = _NO_BOX.sub(" ", text)
    if answer_type == "choice":
        return choices.letter(text[-_TAIL:])
    if answer_type == "bool":
        return choices.truth(text[-_TAIL:])
    if len(whole := text.strip()) < 200 and whole:
        if read_number(unset(whole)):
            return whole
        if (formula := _DISPLAY.fullmatch(whole)) and not PROSE.search(inner := next(filter(None, formula.groups()))):
            return inner.strip()
    return _last_number(text).text


_TAG = re.compile(r"<answer>(.{0,4000}?)</answer>", re.DOTALL | re.IGNORECASE)


_SPECIAL = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:eos|bos|pad|end_of_turn|endoftext)>")


def extract(text: str, answer_type: str = "number", strict: bool = False) -> str | None:
    r"""The answer that a completion gives, as it is written there, or None.

    Args:
        text: the completion.
        answer_type: "number" (a number or an expression), "choice" (one letter), "bool", or "free" (text).
        strict: accept only an answer that is marked: `<answer>`, `\boxed{}`, `####` or "the answer is".

    A hedged answer comes back as the list it is: "3, 4" for "The answer is 3 or 4".
    """
    check_type(answer_type)
    text = text.rpartition("</think>")[2]
    if "<think>" in text:  # it is still thinking
        return None
    text = plain(_SPECIAL.sub("", text) if "<" in text else text)
    if "</" in text and (tags := _TAG.findall(text)):
        return _within(tags[-1].strip(), answer_type)
    answer: str | None = None
    spans = _boxed(text, answer_type) or _hashed(text, answer_type) or _statements(text, answer_type)
    if spans:
        run = _last_run(text, spans)
        answer = _with_neighbours(text, run, answer_type).content
        if answer_type == "number" and (corrected := _corrected(text, spans[-1].end)):
            answer = corrected
    elif not strict:
        answer = _flexible(text, answer_type)
    return answer if answer and len(answer) <= MAX_ANSWER else None


def _corrected(text: str, start: int) -> str | None:
    """The number of a correction behind a marked answer: "No wait, it's 7"."""
    matches = list(_CORRECTION.finditer(text, start, start + _TAIL))
    return _sentence_answer(open_formulas(text[matches[-1].end() :][:MAX_ANSWER]), True).text if matches else None


def _within(content: str, answer_type: str) -> str | None:
    """The answer between tags: what is marked there, the whole of it, or what its last sentence says."""
    if not content or len(content) > MAX_ANSWER:
        return None
    spans = boxes(content) or hashes(content)
    if spans:
        return spans[-1].content
    if answer_type == "number" and items(open_formulas(content)):
        return _flexible(content, answer_type)
    return content if answer_type in ("number", "free") else _flexible(content, answer_type)
