r"""What a completion answers and whether that is right: one extractor and one comparison for training and evaluation.

Three outcomes: `correct`, `wrong`, and `unparsed`: no answer was found, or the grader gave up on the one that was.
Reports keep the last two apart, because an unparsed answer is a question about the parser before it is one about the
model.

`rewards.extraction` finds the answer, `rewards.sentences` and `rewards.choices` read sentences, `rewards.comparison`
compares; math-verify, in a worker process (`rewards.symbolic`), decides what arithmetic cannot.

Hedging: an answer is correct only if *every* candidate it lists is. Candidates belong to one list when only
punctuation and connectives stand between them, or when an "or" does, within a sentence. So "3 or 4",
`\boxed{3}, \boxed{4}` and `\boxed{3, 4}` are wrong for 3, while the numbers and boxes of a derivation do no harm: only
the last answer counts. docs/rewards.md states the rules in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rewards import symbolic
from rewards.comparison import ANSWER_TYPES as ANSWER_TYPES
from rewards.comparison import Question, is_text, pairs, readable, resolve, same
from rewards.comparison import canonical as canonical
from rewards.extraction import extract as extract
from rewards.plain import clean

Outcome = Literal["correct", "wrong", "unparsed"]


class Judgement(NamedTuple):
    outcome: Outcome
    prediction: str | None
    failure: symbolic.Failure | None = None  # why the grader gave up, if it did


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
    predictions = []
    for text, gold, kind in zip(texts, golds, answer_types, strict=True):
        prediction = extract(text, kind, strict)
        if prediction is None and kind == "number" and is_text(clean(_stated_gold(gold, kind))):
            prediction = extract(text, "free", strict)  # a gold in words among numbers
        predictions.append(prediction)
    return _judge_predictions(predictions, golds, answer_types)


def _judge_predictions(
    predictions: Sequence[str | None], golds: Sequence[str], answer_types: Sequence[str]
) -> list[Judgement]:
    questions: list[Question | None] = [
        None if prediction is None else same(prediction, _stated_gold(gold, answer_type), answer_type)
        for prediction, gold, answer_type in zip(predictions, golds, answer_types, strict=True)
    ]
    asked = list(dict.fromkeys(pair for question in questions if question is not None for pair in pairs(question)))
    found = dict(zip(asked, symbolic.verify(asked), strict=True)) if asked else {}
    judgements: list[Judgement] = []
    for question, prediction in zip(questions, predictions, strict=True):
        if question is None:
            judgements.append(Judgement("unparsed", prediction))
            continue
        failures = [found[pair] for pair in pairs(question) if not isinstance(found[pair], bool)]
        right = resolve(question, lambda pair: found[pair] is True)
        if right or not failures:
            judgements.append(Judgement("correct" if right else "wrong", prediction))
        else:
            judgements.append(Judgement("unparsed", prediction, failures[0]))  # type: ignore[arg-type]
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
