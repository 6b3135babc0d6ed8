"""Evaluations are told apart by their names or paths, and what else differs between them is said.

pytest tests/evaluation/test_differences.py
"""

from pathlib import Path

import pytest

from rl_soft.evaluation.differences import differences, names_of

DECODER = {"thought": "gumbel", "thought_tau": 0.5}
HEADER = {"dataset": "d", "split": "evaluation", "n": 4, "seed": 7, "decoder": DECODER}


@pytest.mark.parametrize(
    ("dirs", "given", "names"),
    [
        (["a/eval", "b/eval"], ["one", "two"], ["one", "two"]),
        (["runs/a/eval_after", "runs/b/eval_after"], ["after RL", "after RL"], ["a", "b"]),
        (["x/seed1/eval_after", "y/seed2/eval_after"], ["after RL"] * 2, ["x/seed1", "y/seed2"]),
        (["runs/a", "other/runs/b"], ["e", "e"], None),
    ],
)
def test_equal_names_become_what_differs_in_the_paths(dirs, given, names):
    found = names_of([Path(d) for d in dirs], given)
    assert found == names if names else len(set(found)) == len(found)


def test_settings_that_differ_are_said_in_words():
    other = {**HEADER, "seed": 8, "decoder": {"thought": "gumbel", "thought_tau": 0.3}}
    (said,) = differences(["a", "b", "c"], [HEADER, other, HEADER])
    assert "b was not evaluated as a" in said
    assert "thought_tau 0.3 against 0.5" in said and "seed 8 against 7" in said and "thought 'gumbel'" not in said
    assert differences(["a", "b"], [HEADER, HEADER]) == []
