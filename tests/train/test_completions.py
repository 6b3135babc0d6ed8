"""A few completions as a table: it fits a screen, whatever the rollout.

pytest tests/train/test_completions.py
"""

import io
import math

import pytest
from rich.console import Console

from rl_soft.train.runtime.completions import short, show_completions


@pytest.mark.parametrize(("rows", "shown"), [(None, 4), (2, 2), (0, 0), (100, 64)])
def test_a_rollout_of_long_completions_is_a_few_short_rows(rows, shown):
    out = io.StringIO()
    prompts = [f"p{i // 8} " + "why " * 200 for i in range(64)]
    numbers = {"math_accuracy": [math.nan] * 64, "advantage": [0.5] * 64}
    console = Console(file=out, width=120)
    show_completions(3, prompts, ["so " * 2000] * 64, numbers, rows, console)
    text = out.getvalue()
    lines = [line.rstrip() for line in text.splitlines()]
    assert len(lines) <= 5 + 8 * shown and text.count(" 0.50 ") == shown
    if rows is None:
        assert "step 3: 4 of 64 completions" in text and [f"p{i} " in text for i in range(8)] == [True, False] * 4


def test_chat_messages_are_shown_by_the_last_one():
    assert short([{"role": "user", "content": "a\nb"}]) == "a b"
    assert len(short("x" * 10_000)) < 200
