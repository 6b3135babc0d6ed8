"""What a sentence says about letters, and about yes and no."""

from __future__ import annotations

import re
from collections.abc import Callable

from rewards.sentences import Item, enumerated, stop

# A letter by itself; "A" and "I" as words of English are none, nor is a small letter outside brackets.
_LETTER = re.compile(
    r"(?<![A-Za-z0-9'&])(?:(A(?!\s(?!is\b|or\b|and\b|as\b|because\b|since\b|was\b|are\b|over\b|but\b|leaving\b)[a-z])|[B-HJ-Z]|I(?=[).:]|\Z))"
    r"|(?<=\()([a-z])(?=\)))(?![A-Za-z0-9'])(?!-[A-Za-z])"
)
_CUE = r"(?:options?|choices?|answers?|choose|pick|select|chose|picked|letter|leav\w+|prefer|ans|选|是)"
_CUED = re.compile(
    rf"\b{_CUE}\s*(?:\w{{2,12}}\s+){{0,2}}(?:is|would\s+be|:|=)?\s*[*\"'(\[]*([a-z])(?![A-Za-z0-9'])(?=[).:\]\s*\"']|\Z)",
    re.I,
)
_FIRST = re.compile(
    r"[\s*_\"'(\[$]*(?:\\\w+\{\s?\(?)?([A-Za-z])(?![A-Za-z0-9'])[)\]}*_\"']*(?=\s*[.:,;)(—-]|\s*\Z|\s*\n|\s+(?:because|since|as|is|or|and|over|not|but)\b)"
)
_TYPE = re.compile(
    r"[a-z](?<!\bis)(?<!\bor)(?<!\band)(?<!\b[Ss]o)(?<!\bbut)(?<!\bbe)(?<!\bnot)(?<!\bnor)(?<!\bthen)(?<!\bboth)\s\Z"
)
_CUE_BEFORE = re.compile(
    rf"(?:{_CUE}|say|(?:go|left)\s+with|it's|neither|either|exclude|excludes|reject|rejects|than|only|just|clearly|definitely|therefore|hence|thus)\W*\Z",
    re.I,
)
_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|nor|neither|never|doubt\w*|unlikely|cannot|except|exclud\w+|reject\w*|than|over|hardly|eliminat\w+|instead\s+of)|n't|\brul\w+\s+out"
    r"|\b(?:any|every|no)\w*\s+but)(?:\s+(?:be|is|the|option|choice|answer|pick|choose|letter|likely|equal|to|it|that|it's))*[\s(*]*\Z",
    re.I,
)
_DENIED_AFTER = re.compile(
    r"[)*\s]*(?:(?:is|are|was|were|seems|being)\s+(?:\w+ly\s+)?(?:not|wrong|incorrect|false|impossible|out\b|too\b|a\s+(?:trap|(?:common\s+)?mistake))"
    r"|(?:is|was|are|ca|would|could)n't|cannot|can\s+not|(?:is\s+|can\s+be\s+)?(?:ruled\s+out|excluded|eliminated|discarded)|fails)",
    re.I,
)
_RIGHT = re.compile(
    r"[)*\s]*(?:is|must\s+be|seems)\s+(?:\w+ly\s+)?(?:the\s+)?(?:right|correct|true|best|answer)\b", re.I
)


def _letters(text: str) -> list[Item]:
    found = [Item(m.start(), m.end(), m[1] or m[2]) for m in _LETTER.finditer(text)]
    spots = {item.start for item in found}
    return sorted(
        [*found, *(Item(m.start(1), m.end(1), m[1]) for m in _CUED.finditer(text) if m.start(1) not in spots)]
    )


_AFTER_FIRST = re.compile(r"\s*[).:,;\n(—-]|\s*\Z|\s+(?:because|since|over|not)\b")
_ARTICLE = re.compile(r"\s(?!(?:is|or|and|because|since|as|over|but|not)\b)[a-z]")


def _opens_with(text: str, opening: bool) -> Item | None:
    """The letter that a text opens with, if it is one and no word: "A dog" has none."""
    first = _FIRST.match(text)
    if first is None or (first[1] in "AI" and _ARTICLE.match(text, first.end(1))):
        return None
    shown = opening or first[1].isupper() or len(text.strip()) < 6 or text[first.end() :][:1] in (")", ".", ":")
    return Item(first.start(1), first.end(1), first[1]) if shown else None


def _listed(gap: str) -> bool:
    return ";" not in gap and enumerated(gap)


def letter(text: str, opening: bool = False) -> str | None:
    """The letter that a text chooses, or the list of those that it leaves open; None if there is none.

    Args:
        opening: the text is what stands behind "the answer is": its first letter counts before its last.
    """
    found = _letters(text)
    if first := _opens_with(text, opening):
        found = [first, *(item for item in found if item.start > first.start)]
        opening = opening or _AFTER_FIRST.match(text, first.end) is not None
    if not found:
        return None
    kept, chosen = [], []
    denied_before = False
    for i, item in enumerate(found):
        gap = text[(found[i - 1].end if i else 0) : item.start]
        right = text[item.end : (found[i + 1].start if i + 1 < len(found) else len(text))]
        # "A and B are wrong" denies both
        denied = bool(_DENIED_BEFORE.search(gap)) or (denied_before and enumerated(gap) and "but" not in gap)
        after, last = right, i
        while last + 1 < len(found) and enumerated(after) and len(after) < 12:
            last += 1
            after = text[found[last].end : (found[last + 1].start if last + 1 < len(found) else len(text))]
        denied = (denied and not _RIGHT.match(after)) or bool(_DENIED_AFTER.match(after))
        denied_before = bool(_DENIED_BEFORE.search(gap)) or (denied_before and enumerated(gap))
        if denied or (_TYPE.search(gap) and not _CUE_BEFORE.search(gap) and i > 0) or (i > 0 and gap.endswith("-")):
            continue
        kept.append(i)
        if _RIGHT.match(right):
            chosen.append(i)
    if not kept:
        return None
    start = kept[0] if opening else chosen[-1] if chosen else kept[-1]
    run = [start]
    while run[-1] + 1 in kept and _listed(text[found[run[-1]].end : found[run[-1] + 1].start]) and not chosen:
        run.append(run[-1] + 1)
    while (
        not opening
        and not chosen
        and run[0] - 1 in kept
        and _listed(text[found[run[0] - 1].end : found[run[0]].start])
    ):
        run.insert(0, run[0] - 1)
    return ", ".join(dict.fromkeys(found[i].text.upper() for i in run))


_BOOL = re.compile(
    r"\b(?:yes|true|false|no(?!\s+(?!it|he|she|they|we|this|that|there|because|since|as|or|and)[a-z]))\b", re.I
)
_NOT = re.compile(
    r"(?:\b(?:not|never|hardly|cannot|neither|nor)|n't)(?:\s+(?:be|say|necessarily|always|quite|the|a|really|at|all))*\s*\Z",
    re.I,
)


def _truths(text: str) -> list[Item]:
    """The words of truth in a text, those that are negated turned round: false for "not true"."""
    found = []
    for match in _BOOL.finditer(text):
        word = match.group()
        if _NOT.search(text, max(0, match.start() - 40), match.start()):
            word = (
                {"true": "false", "false": "true", "yes": "no", "no": "yes"}[word.lower()]
                if word.lower() in ("true", "false")
                else ""
            )
        if word:
            found.append(Item(match.start(), match.end(), word))
    return found


def truth(text: str, opening: bool = False) -> str | None:
    """The yes, no, true or false that a text takes, or the list of both; None if there is none."""
    found = _truths(text)
    if not found:
        return None
    first = 0 if opening or text[: found[0].start].strip(' *"(\n') == "" else len(found) - 1
    while first > 0 and stop(text, found[first - 1].end, found[first].start) == found[first].start:
        first -= 1  # to the opening of the last sentence that takes a side
    last = first
    while last + 1 < len(found) and _listed(text[found[last].end : found[last + 1].start]):
        last += 1
    return ", ".join(dict.fromkeys(item.text for item in found[first : last + 1]))


def names(answer_type: str) -> Callable[[str], list[Item]]:
    """What finds the candidates of a type in a text."""
    return _letters if answer_type == "choice" else _truths
