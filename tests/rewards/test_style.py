"""Rewards that TRL and open-r1 have too: the same figures as TRL's, where TRL has them.

pytest tests/rewards/test_style.py
"""

import random

import pytest
import trl.rewards

from rewards import (
    CodeFormat,
    Repetition,
    answer_format,
    reasoning_steps,
    relative_length,
    tag_count,
    think_format,
)

PIECES = ["<think>", "</think>", "\n", "a", "<answer>", "\n</think>\n<answer>\n", "\n</answer>"]


def texts():
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=n)) for n in range(9) for _ in range(40)]


def test_think_format_is_trl_s():
    theirs = trl.rewards.think_format_reward([[{"content": text}] for text in texts()])
    assert think_format(texts()) == theirs and 0 < sum(theirs) < len(theirs)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repetition_is_trl_s(size):
    draw = random.Random(0)
    ids = [draw.choices(range(4), k=n) for n in range(12)]
    theirs = trl.rewards.get_repetition_penalty_reward(size, -0.5)(ids)
    assert Repetition(size, -0.5)(completion_ids=ids) == pytest.approx(theirs) and min(theirs) < 0


def test_formats_of_open_r1():
    whole = "<think>\nx\n</think>\n<answer>\n```python\n1\n```\n</answer>"
    cases = [whole, whole + "\nmore", whole.replace("python", "cpp"), whole.replace("\n</think>", "</think>"), ""]
    assert answer_format(cases) == [1, 1, 1, 0, 0]
    assert CodeFormat()(cases) == [1, 1, 0, 0, 0]
    assert CodeFormat()(cases, language=["cpp"] * 5) == [0, 0, 1, 0, 0]
    assert tag_count([*cases, whole + whole]) == [1, 1, 1, 0.75, 0, 0]
    assert reasoning_steps(["Step 1: a\nStep 2: b\n- c\n- d", "First, a", ""]) == [1, pytest.approx(1 / 3), 0]


def test_relative_length_compares_the_completions_of_a_problem():
    found = relative_length(
        prompts=["p", "p", "p", "q", "r"], completions=["3", "3", "4", "3", "3"],
        completion_ids=[[1], [1] * 3, [1], [1] * 9, [1]], answer=["3", "3", "3", "3", ""],
    )  # fmt: skip
    assert found == [0.5, -0.5, 0, 0, None]


@pytest.mark.parametrize("made", [lambda: Repetition(0), lambda: Repetition(2, 1.0)])
def test_parameters_that_mean_nothing_are_refused(made):
    with pytest.raises(ValueError, match="must be"):
        made()
