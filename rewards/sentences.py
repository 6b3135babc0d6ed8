r"""What a sentence says of the numbers in it: which it answers, and which it denies, bounds, or only computes with.

A sentence is read as items (numbers with their units, and expressions) and the words between them. An item that is
denied ("not 5", "5 is wrong") or a part of something ("5 out of 10" has 10) is dropped. One that is bounded ("at least
5"), computed with ("half of 10", "7 minus 2") or conditional ("5 if n is odd") spoils the list of items that it
belongs to: the sentence then answers nothing. Words that change a number are a closed class and stand here; all other
words are prose.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rewards.comparison import side
from rewards.numbers import DECIMAL, PERCENT, POWER, SCALE_WORDS, read_number
from rewards.plain import clean
from rewards.units import SYMBOLS, read_unit


class Item(NamedTuple):
    start: int
    end: int
    text: str


# --- Items -----------------------------------------------------------------------------------------------------------

_POWER = POWER.replace("(?P<power>", "(?:")
_FRACTION = rf"\\[dtc]?frac\s?(?:\{{\s?-?{DECIMAL}\s?\}}|[0-9])\s?(?:\{{\s?-?{DECIMAL}\s?\}}|[0-9])"
_NUMBER = (
    rf"(?:\\?[{SYMBOLS}]\s?-?)?(?:{_FRACTION}|(?<![A-Za-z0-9_])(?:[0-9]{{1,9}},[0-9]{{1,2}}(?=\s?(?:[{SYMBOLS}]|EUR))|{DECIMAL})(?:[eE][-+]?[0-9]{{1,9}}(?![0-9A-Za-z])"
    rf"|\s{{0,3}}(?:\\times|\*|x)\s{{0,3}}{_POWER}|\s?{_FRACTION}|\ {{1,3}}[0-9]{{1,18}}/[0-9]{{1,18}}(?![0-9])"
    rf"|\s?/\s?{DECIMAL})?)(?:\s?\\?[{SYMBOLS}](?![0-9]))?(?:[\s-]?(?:{SCALE_WORDS})(?![A-Za-z])){{0,2}}+(?:\s?{PERCENT})?"
)
_UNIT = re.compile(
    r"\s{0,2}((?!in\b|each\b|am\b|time\b)[A-Za-z]{2,12}(?:\s?\^\s?\{?-?[0-9]\}?)?(?:\s?(?:/|per\s)\s?[A-Za-z]{1,12})?)(?![A-Za-z])"
)
_FUNCTION = r"(?<![A-Za-z\\])(?:pi|Pi|PI|sqrt|sin|cos|tan|log|ln|exp|mod|theta|alpha|beta|gamma|infinity)(?![A-Za-z])"
_LETTER = r"(?:[B-HJ-Zb-z]|[aAI](?=\s?[=+*/^_<>]|\s?-\s?[0-9(]))"  # "a" and "I" are words
_NAME = rf"(?<![A-Za-z0-9'\\]){_LETTER}(?:_?[0-9]{{1,3}}(?![A-Za-z0-9]))?(?![A-Za-z'])"
_ATOM = (
    rf"\\begin\{{[^\\]{{1,20}}\}}(?:(?!\\begin).){{1,600}}?\\end\{{[a-z]{{1,12}}\*?\}}|{_NUMBER}"
    rf"|{_FUNCTION}|{_NAME}|(?<=[0-9)])[A-Za-z]{{1,3}}(?![A-Za-z])|_\s?(?:\{{[^{{}}]{{0,40}}\}}|[0-9A-Za-z])|(?<=[\^{{])[0-9]{{1,9}}"
    r"|\\(?:[A-Za-z]{2,}|[{}|,;:!])|[(\[{}\])|+*/^=<>!±~,;&]|-|(?<=[0-9]):(?=[0-9])|(?<=\s):(?=\s)"
)
_SKIPPED = r"(?!(?:sqrt|theta|alpha|beta|gamma|infinity)(?![A-Za-z]))[A-Za-z]{4,}+"  # words, for speed
_RUN = re.compile(
    rf"{_SKIPPED}|((?<![\^_])(?<!\^\{{)(?![)\]}}/*^=!,;&:~+]|\\[,;:!])(?:{_ATOM})(?:\s{{0,3}}(?:{_ATOM}))*+)",
    re.DOTALL,
)
_CUT = re.compile(rf"({_NUMBER})|([(\[{{])|([)\]}}])|([,;&]|(?<=[0-9])\|(?=[0-9]))", re.DOTALL)
_CUTTABLE = re.compile(r"[,;&|()\[\]{}]|[0-9%]\s+[^\s0-9]{0,9}[0-9]")  # a run without it is one item
_SUBSTANCE = re.compile(
    r"[0-9]|\\(?!times|cdot|approx|quad|left|right|text|ldots|to(?![A-Za-z])|[,;:!])[A-Za-z]{2}|[A-Za-z]\s?(?:[-+*/^=<>]\s?[A-Za-z]|!)|\|[A-Za-z]|(?<![A-Za-z])(?:pi|sqrt)(?![A-Za-z])"
)
_ASIDE = re.compile(r"\((?!\s*(?:or|and|maybe|perhaps)\b)(?=[^()]{0,20}[A-Za-z]{2})[^()]{1,200}\)")
_FORMULA = re.compile(r"\$\$?([^$]{1,500})\$\$?(?![0-9])|\\\(([^$]{1,500}?)\\\)|\\\[([^$]{1,500}?)\\\]")
PROSE = re.compile(r"(?:\A|\s)(?!(?:or|and|pi|sqrt|sin|cos|tan|log|ln|mod|if)\b)[A-Za-z]{2,}")
_COMMAND = re.compile(r"(\\[A-Za-z]{2,})(?=[0-9])")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox|boldsymbol)\s?\{([^{}]{0,200})\}")


def open_formulas(text: str) -> str:
    """The text with formulas as plain text; prose between two dollar signs is none."""
    if "\\" in text:
        text = _TEXT.sub(r" \1 ", text)
        text = _COMMAND.sub(r"\1 ", text)
    elif "$" not in text:
        return text
    return _FORMULA.sub(lambda m: m[0] if PROSE.search(m[1] or m[2] or m[3]) else f" {m[1] or m[2] or m[3]} ", text)


def items(sentence: str) -> list[Item]:
    """The numbers and expressions of a sentence, each as far as it goes."""
    found: list[Item] = []
    for run in _RUN.finditer(sentence):
        if run[1] is None or (found and run.start() < found[-1].end):  # words; the unit of the item before
            continue
        if _CUTTABLE.search(run[1]) is None:
            _add(found, sentence, run.start(), run.end())
            continue
        start, depth, last, edge = run.start(), 0, run.start(), False
        for cut in _CUT.finditer(sentence, run.start(), run.end()):
            if cut[1]:
                if edge and depth == 0 and sentence[last : cut.start()].isspace():  # two numbers side by side
                    _add(found, sentence, start, last)
                    start = cut.start()
                last, edge = cut.end(), True
            elif cut[2]:
                depth += 1
            elif cut[3]:
                depth -= 1
            elif depth <= 0:
                _add(found, sentence, start, cut.start())
                start, edge = cut.end(), False
        _add(found, sentence, start, run.end())
    return found


def _add(found: list[Item], sentence: str, start: int, end: int) -> None:
    text = sentence[start:end]
    if not _SUBSTANCE.search(text):
        return
    body = text.lstrip(" \t,;:=&~").rstrip(" \t,;:=([{<>~/*-")
    body = body.rstrip("| ") if body.count("|") % 2 else body
    start += text.index(body) if body else 0
    before = sentence[:start].rstrip(" ")
    if (dash := re.match(r"-(\s*)(?=\S)", body)) and before:
        beside = before[-1].isalnum() or before[-1] in ")]}\"'"
        if (beside and (dash[1] or len(before) == start)) or (dash[1] and before[-1] not in ":=(,"):
            start, body = start + dash.end(), body[dash.end() :]  # a dash between words
    opened, closed = (sum(map(body.count, marks)) for marks in ("([{", ")]}"))
    while body.startswith(("(", "[", "{")) and opened > closed:
        start, body, opened = start + 1, body[1:].lstrip(), opened - 1
    while body.endswith((")", "]", "}")) and closed > opened and body[-2:-1] != "\\":
        body, closed = body[:-1].rstrip(), closed - 1
    if body.endswith("!") and read_number(body.rstrip("! ")):
        body = body.rstrip("! ")
    if body.startswith("[") and body.endswith("]") and read_number(body[1:-1]):
        start, body = start + 1, body[1:-1]
    if not body:
        return
    end = start + len(body)
    unit = _UNIT.match(sentence, end)
    if unit and body[-1] in "0123456789})." and read_unit(unit[1]) and (body.isdecimal() or read_number(clean(body))):
        end, body = unit.end(), f"{body} {unit[1]}"
    found.append(Item(start, end, body))


# --- Words around an item --------------------------------------------------------------------------------------------

_ARTICLE = r"(?:\s+(?:the|a|an|about|around|number|that\s+of))*\s*\Z"
_CLAUSE = re.compile(
    r"[,;:—]|(?<!thing )\bbut\b(?! not)|\b(?:so|because|since|hence|thus|therefore|which|and|then|when|as)\b",
    re.IGNORECASE,
)
# Patterns of lower-case text, which are twice as fast as those of any case.
_DENIED_BEFORE = re.compile(
    r"\b(?:not|never|neither|nor|cannot|hardly|doubt\w*|except|exclud\w+|unlikely|reject\w*|impossible|untrue|false|wrong|nowhere|nobody|eliminat\w+|discard\w*|dismiss\w*|besides)\b"
    r"|\bno\s+(?:longer|means|way|case)\b"
    rf"|n't\b|\brul\w+\s+out\b|\binstead\s+of{_ARTICLE}|\bover{_ARTICLE}(?<=pick)"
    rf"|\brather\s+than{_ARTICLE}|\b(?:other|else)\s+than{_ARTICLE}|\bdifferent\s+from{_ARTICLE}|\bfar\s+from{_ARTICLE}"
)
_ALL_BUT = re.compile(rf"\b(?:any|every|no|all)\w*\s+(?:\w+\s+)?but{_ARTICLE}")
_VERB = r"(?:is|are|was|were|would\s+be|will\s+be|seems|must\s+be)"
_DENIED_AFTER = re.compile(
    rf"\s*,?\s*{_VERB}\s+(?:\w+ly\s+)?(?:not\b|(?:the\s+|an?\s+)?(?:wrong|incorrect|false|impossible|invalid)\b|too\s|ruled\s+out|excluded\b|a\s+(?:trap|(?:common\s+)?mistake))"
    r"|\s*(?:is|are|was|were|ca|would|does|do|did|wo|could)n't\b|\s*(?:cannot|fails?|is\s+rejected)\b|\s*(?:can|could|would|does)\s+not\b"
)
_PART = re.compile(r"\s*of\s+(?:them|which|whom|those|these)\b")
_WHOLE = re.compile(r"\bout\s+of(?:\s+(?:the|all|a\s+total\s+of))?\s*\Z")
_OF = re.compile(r"\s*of\s+(?:(?:the|all|these|those|his|her|their|its|my|our)\s+)?")
_COMPARED = re.compile(
    r"\s*(?:\w+\s+)?(?:more|less|fewer|greater|larger|smaller|higher|lower|older|younger)(?:\s+\w+)?\s+than\b"
)
_LINKED = re.compile(
    r"\s*(?:\.\.+|(?:\w+\s+){0,3}(?:xor|over|through|until|versus|vs\.?|to|from|by|with|into|onto|against))\s*"
)
_BOUND_BEFORE = re.compile(
    r"(?:(?:more|less|fewer|greater|larger|bigger|smaller|higher|lower|better|worse)\s+than(?:\s+or\s+equal\s+to)?"
    r"|\bat\s+(?:least|most)|\bup\s+to|\b(?:over|under|above|below|beyond|exceeds|exceeding|nearly|almost|near|barely)"
    rf"|\bclose\s+to|\bno\s+(?:more|less|fewer)\s+than|\bin\s+excess\s+of|\bas\s+\w+\s+as|\bat\s+(?:minimum|maximum)|\b(?:minimum|maximum)\s+of|\bsomewhat|[<>]|\\(?:ge|le|geq|leq|ne|neq)){_ARTICLE}"
)
_BOUND_AFTER = re.compile(
    r"\s*(?:or\s+(?:more|less|fewer|so|above|below|higher|lower|greater|better|over|under)\b|at\s+(?:least|most)\b"
    r"|and\s+(?:up|above|more|over)\b|below\b|above\b|under\b)"
)
_COMPUTED_BEFORE = re.compile(
    r"\b(?:(?:half|thirds?|quarters?|fourths?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|percent|per\s?cent|square|cube"
    r"|roots?|sum|product|difference|ratio|quotient|log(?:arithm)?|factorial|reciprocal|inverse|multiples?|divisors?|powers?"
    r"|factors?|remainder|average|mean|double|triple|negative|opposite)\s+(?:of|between)|half|twice|thrice|doubled?|tripled?"
    rf"|times|plus|minus|divided\s+by|multiplied\s+by|modulo|mod){_ARTICLE}|%\s+of{_ARTICLE}"
)
_COMPUTED_AFTER = re.compile(
    r"\s*(?:(?:squared|cubed|factorial|doubled|tripled|halved|plus|minus|times(?!\s+as)|divided|multiplied|raised|choose|rem"
    r"|remainder|mod|modulo|to\s+the\s+\w*\s?power"
    r"|(?:less|more|fewer|greater|larger|smaller|higher|lower)\s+than|pi|theta|infinity|r\s*\Z)(?![a-z])"
    r"|(?:percent|%)\s*of\b|\^|!(?!!*\s*\Z)|\\pi)"
)
_CONDITION = re.compile(r"\s*,?\s*(?:if|unless|provided|depending)\b")
_LABEL = re.compile(r"\b(?:case|guess|part|step|option|attempt)\s*\Z", re.IGNORECASE)  # of a number with a colon
_NEGATIVE = re.compile(r"(?:\A|\s)(?:negative|minus)\s+\Z")
_CONNECTIVE = r"(?:or|and|either|both|maybe|perhaps|possibly|alternatively|otherwise|else|also)"
_GLUE = re.compile(
    rf"(?:[^\w=+*<>^-]|\*\*|\b(?:{_CONNECTIVE}|text|quad|qquad|is|it|be|could|might|answer|the)\b)*+", re.IGNORECASE
)
_LISTING = re.compile(rf"[,;/|&]|\b{_CONNECTIVE}\b", re.IGNORECASE)
OR = re.compile(
    r"\b(?:or|alternatively|otherwise|maybe|perhaps|possibly|versus|vs|(?:second|another|other)\s+(?:guess|possibility|option|answer|candidate)"
    r"|(?:guess|case)\s+[2-9]|(?:could|might|may)\s+also\s+be)\b|\\lor",
    re.IGNORECASE,
)
ALTERNATIVE = re.compile(  # how a sentence opens that only offers another answer
    r"[.!?]?\s{1,3}(?:(?:second|another|other)\s+(?:guess|possibility|option|answer|candidate)|(?:guess|case)\s+[2-9]|or|maybe|perhaps|possibly|alternatively|otherwise"
    r"|(?:it|this|that)\s+(?:could|might|may)(?:\s+also)?)\b",
    re.IGNORECASE,
)
_LABELLED = re.compile(r"\s*[,;]\s*(?:and\s+)?[A-Za-z][A-Za-z ]{0,30}\s?[-—:=]\s*")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Rs|approx|i\.e|e\.g|etc|vs|Mr|Mrs|Ms|Dr|St|Ft|Lt|Col|Gen|Gov|Sgt|Capt|Rev|Inc|Ltd|Co|Prof|Mt|Jr|Sr|No|Fig|Eq|fl|sq|cu|ca|cf|[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]))\Z"
)
_STOP = re.compile(r"(?:(?<!\.)\.|[!?])(?=[\s\"')*]|\Z)|\n")
_GAP = 60  # characters between two candidates of one list


def stop(text: str, start: int = 0, end: int | None = None) -> int:
    """Where the sentence ends that begins at `start`; the stop of an abbreviation ends none."""
    end = len(text) if end is None else end
    for match in _STOP.finditer(text, start, end):
        if match.group() != "." or not _ABBREVIATION.search(text, max(start, match.start() - 8), match.start()):
            return match.start()
    return end


def alternatives(gap: str) -> bool:
    r"""Whether the text between two answers makes them alternatives: that in `\boxed{3} or \boxed{4}`."""
    if len(gap) > _GAP:
        return False
    if _CONDITION.match(gap):
        return True
    return _GLUE.fullmatch(gap) is not None or (OR.search(gap) is not None and _one_sentence(gap))


def _one_sentence(gap: str) -> bool:
    end = stop(gap)
    return end == len(gap) or ALTERNATIVE.match(gap, end) is not None


def enumerated(gap: str) -> bool:
    """Whether the text between two items of a sentence makes a list of them. A `#` ends a list, since it announces
    what follows: steps like `7*3=1;1-4=3;#7` give one answer."""
    if "#" in gap or not (_LISTING.search(gap) or OR.search(gap)):
        return False
    return _LABELLED.fullmatch(gap) is not None or (alternatives(gap) and _one_sentence(gap))


class Reading(NamedTuple):
    """What a sentence answers: the items of one list. No text where it denies all its items; the whole sentence, which
    is no number, where it bounds them or computes with them."""

    text: str | None
    found: bool  # whether there was any item
    first: int  # where the first item starts
    spoiled: bool = False
    last: int = 0  # where the last item of the answer starts


def _clause(words: str) -> str:
    """The words of the clause that an item stands in."""
    boundaries = list(_CLAUSE.finditer(words))
    return words[boundaries[-1].end() :] if boundaries else words


def read(sentence: str, opening: bool = False, keep: bool = False) -> Reading:
    """Reads a sentence, for the item that it opens with or for its last one, each with the list that it belongs to.

    Args:
        opening: take the first item that is not dropped.
        keep: leave an equation whole, where otherwise its right side is the answer.
    """
    found = [
        item
        for item in items(sentence)
        if sentence[item.end : item.end + 1] != ":" or not _LABEL.search(sentence, max(0, item.start - 12), item.start)
    ]
    if not found:
        return Reading(None, False, len(sentence))
    if "(" in sentence:
        shorter = _ASIDE.sub(lambda m: " " * len(m[0]) if m.start() > found[0].start else m[0], sentence)
        if shorter != sentence and (without := items(shorter)):
            sentence, found = shorter, without
    before = [sentence[(found[i - 1].end if i else 0) : item.start].lower() for i, item in enumerate(found)]
    after = [*before[1:], sentence[found[-1].end :].lower()]
    kept, spoiled = [], set()
    joined = [
        i > 0 and (enumerated(gap) or (opening and gap.isspace())) and not _step(found[i - 1].text)
        for i, gap in enumerate(before)
    ]
    for i, item in enumerate(found):
        left, right = before[i], after[i]
        clause = _clause(left)
        if (
            _DENIED_BEFORE.search(clause)
            or _ALL_BUT.search(left)
            or _DENIED_AFTER.match(right)
            or _WHOLE.search(left)
            or (i and _PART.match(right))
        ):
            continue
        if _BOUND_BEFORE.search(clause) and "," in left and i:
            continue  # "he has 5, which is more than 3"
        if i and "," in left and _COMPARED.match(right):
            continue  # "he has 5, 3 more than she has"
        if (
            i and "=" not in item.text and _OF.fullmatch(left)
        ):  # "12 of the 20", but "50% of 20" and "1/2 of 20" are operations
            if (whole := read_number(clean(found[i - 1].text))) and whole.value.denominator == 1 and not whole.percent:
                continue
            spoiled |= {i - 1, i}
        if _NEGATIVE.search(left) and not (i and left.strip() in ("minus", "negative")):
            found[i] = item._replace(text=f"-{item.text}")
        elif ("=" not in item.text and _COMPUTED_BEFORE.search(clause)) or _BOUND_BEFORE.search(clause):
            spoiled.add(i)
        computed = _COMPUTED_AFTER.match(right)
        if computed and (i + 1 < len(found) or not _COMPARED.match(right)):
            spoiled.add(i)
        if i + 1 < len(found) and _LINKED.fullmatch(right):  # "5 added to 7"
            spoiled |= {i, i + 1}
        conditional = _CONDITION.match(right) or (sentence.count(" when ") > 1 and right.startswith(" when "))
        if _BOUND_AFTER.match(right) or conditional or (joined[i] and i - 1 in spoiled):
            spoiled.add(i)
        kept.append(i)
    if not kept:
        return Reading(None, True, found[0].start)
    run = _run(kept, joined, opening, found, after)
    if spoiled.intersection(run) or (run[-1] + 1 in spoiled and joined[run[-1] + 1]):
        phrase = sentence.strip()[:200]
        return Reading(None if read_number(clean(phrase)) else phrase, True, found[kept[0]].start, True)
    texts = [found[i].text for i in run]
    if len(texts) == 1 and not keep:
        right = side(clean(texts[0]), prose=True) if "=" in texts[0] or "\\equiv" in texts[0] else ""
        texts = [right] if right and read_number(right) else texts
    return Reading(", ".join(dict.fromkeys(texts)), True, found[kept[0]].start, last=found[run[-1]].start)


def _step(item: str) -> bool:
    """Whether an item is an equation that derives another, as `4x = 80` does in "4x = 80 and x = 20"."""
    left, equals, _ = item.partition("=")
    return equals != "" and _PLAIN_NAME.fullmatch(left) is None


_PLAIN_NAME = re.compile(r"\s*(?:[A-Za-z]{1,3}(?:_?\{?\w\}?)?(?:\(\w\))?|\([A-Za-z, ]{1,20}\)|\\[a-z]{1,9})\s*")


_RESULT = re.compile(r",?\s*(?:which|that|this|or|it)?\s*(?:is|equals|gives|makes|i\.e\.|=),?\s*", re.IGNORECASE)


def _results(found: list[Item], after: list[str], i: int) -> bool:
    """Whether an item is the result of the one before: "5 + 10 which is 15", "3 boxes x 4 = 12"."""
    gap = after[i - 1]
    if "=" in found[i].text:
        return re.fullmatch(r"\s*(?:[a-z]+\s+){0,2}", gap) is not None
    return _RESULT.fullmatch(gap) is not None and not read_number(found[i - 1].text)


def _run(kept: list[int], joined: list[bool], opening: bool, found: list[Item], after: list[str]) -> list[int]:
    """The kept items of one list, from the first or from the last one."""
    if opening:
        run = kept[:1]
        for i in kept[1:]:
            if i == run[-1] + 1 and joined[i]:
                run.append(i)
            elif len(run) == 1 and i == run[0] + 1 and _results(found, after, i):
                run = [i]
            else:
                break
        return run
    run = kept[-1:]
    while run[0] - 1 in kept and joined[run[0]]:
        run.insert(0, run[0] - 1)
    return run
