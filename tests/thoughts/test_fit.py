"""Rows that a model cannot take are refused by row, before anything is trained.

pytest tests/thoughts/test_fit.py
"""

from dataclasses import replace

import pytest
from conftest import rows, tiny_policy

from rl_soft.thoughts.fit import check_characters, check_lengths
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking


@pytest.fixture
def layout():
    return Layout(Thinking(num_thoughts=3, answer_prompt="#", max_answer_tokens=4), tiny_policy().tokenizer)


def test_the_longest_row_decides(layout):
    some = rows(8)
    need = max(len(layout.prompt_ids(row.question)) for row in some) + layout.max_completion_length
    check_lengths(some, layout, need, "sums")
    check_lengths(some, layout, None, "sums")
    with pytest.raises(ValueError, match=rf"dataset sums, row sum/\d: .* {need} tokens, .* has {need - 1} positions"):
        check_lengths(some, layout, need - 1, "sums")


@pytest.mark.parametrize(("change", "where"), [({"question": "1*2="}, "question"), ({"answer": "2*"}, "answer")])
def test_a_character_without_a_token_is_named_with_its_row(layout, change, where):
    some = rows(4)
    check_characters(some, layout, "sums")
    some[2] = replace(some[2], **change)
    with pytest.raises(
        ValueError, match=rf"dataset sums, row sum/2: .* no token for '\*', which stands in the {where}"
    ):
        check_characters(some, layout, "sums")
