r"""Pairs of a completion and a gold answer with the verdict that is right: none of them may change unnoticed.

pytest tests/test_answers.py

`answer_pairs.jsonl` has one pair per line: `set` (catalogue: written from outside; own: written before the rules were
tuned), `cat` (the kind of trap), `kind` (the answer type), `completion`, `gold`, `want`, and `refused` (the rule by
which a right answer is refused all the same).
"""

import json

import pytest
from conftest import ROOT

from rewards import symbolic
from rewards.answers import judge, judge_many
from rewards.comparison import ANSWER_TYPES
from rewards.extraction import extract
from rewards.numbers import Number, read_number
from rewards.units import read_unit

PAIRS = [json.loads(line) for line in (ROOT / "tests/cases/answer_pairs.jsonl").read_text().splitlines()]


def verdicts(pairs):
    found = []
    for i in range(0, len(pairs), 64):  # the time limit is that of a batch
        columns = ([pair[name] for pair in pairs[i : i + 64]] for name in ("completion", "gold", "kind"))
        found += [judgement.outcome == "correct" for judgement in judge_many(*columns)]
    return found


@pytest.mark.parametrize("which", ["catalogue", "own"])
def test_no_verdict_of_the_pairs_has_changed(which):
    pairs = [pair for pair in PAIRS if pair["set"] == which]
    expected = [pair["want"] and "refused" not in pair for pair in pairs]
    wrong = [pair for pair, right, want in zip(pairs, verdicts(pairs), expected, strict=True) if right != want]
    assert len(pairs) > 600 and wrong == []


def test_every_type_of_answer_has_pairs_of_both_verdicts():
    assert {(pair["kind"], pair["want"]) for pair in PAIRS} == {
        (kind, w) for kind in ANSWER_TYPES for w in (True, False)
    }


@pytest.mark.parametrize(
    "rest",
    [
        "!",
        " pi",
        r"\pi",
        "_2",
        "^2",
        " theta",
        " xy",
        " below zero",
        " 6",
        " mod 3",
        "x",
        " rem 2",
        " is wrong",
        "±1",
        "²",
    ],
)
def test_nothing_unknown_beside_a_number_is_dropped(monkeypatch, rest):
    monkeypatch.setattr(symbolic, "Worker", lambda: pytest.fail("a plain gold went to math-verify"))
    assert judge(rf"\boxed{{5{rest}}}", "5")[0] == "wrong"


@pytest.mark.parametrize("digits", [10, 100, 900])
def test_whole_numbers_are_exact_at_any_size(digits):
    number = 10**digits + 7
    assert judge(rf"\boxed{{{number}}}", str(number))[0] == "correct"
    assert judge(rf"\boxed{{{number + 1}}}", str(number))[0] == "wrong"


@pytest.mark.parametrize("exponent", [3, 30, 300])
def test_tolerance_is_relative(exponent):
    third = f"{1 / 3:.7f}".removeprefix("0.")
    assert judge(f"{third}e-{exponent + 7}", rf"\frac{{1}}{{3{'0' * exponent}}}")[0] == "correct"
    assert judge(f"1e-{exponent}", f"1.001e-{exponent}")[0] == "wrong"


def test_a_dash_is_a_minus_only_before_its_number():
    minus = ["-5", "- 5", "The answer is -5.", "x = -5", "The answer is: - 5", "#### -5", "−5"]
    dashes = ["The answer is:\n- 5", "Total - 5", "Total – 5 apples", "The answer — 5 — is clear"]
    assert {read_number(extract(text)).value for text in minus} == {-5}
    assert {read_number(extract(text)).value for text in dashes} == {5}


def test_units_are_converted_within_a_dimension():
    assert read_unit("km/h").dimension == read_unit("m s^{-1}").dimension != read_unit("m").dimension
    assert judge("#### 2 hours", "120 minutes")[0] == judge("#### 2 hours", "2")[0] == "correct"
    assert judge("#### 2 hours", "2 minutes")[0] == "wrong"
    assert read_unit("theta") is read_unit("xy") is read_unit("Pi") is None


def test_words_and_digits_are_one_number():
    for words, value in [("twelve", 12), ("forty-two", 42), ("one hundred and five", 105), ("two thousand", 2000)]:
        assert read_number(words) == Number(value) == read_number(str(value))
    assert read_number("five five") is read_number("and") is read_number("a") is None


def test_what_is_still_thought_is_no_answer():
    for kind, text in [("number", "5"), ("choice", "A"), ("bool", "yes"), ("free", "Paris")]:
        assert extract(f"<think>The answer is {text}", kind) is None
        assert extract(f"<think>hm</think>{text}", kind) == text
        assert extract(f"so <answer> {text} </answer> it is", kind, strict=True) == text
