"""The rewards of docs/own_rewards.md: what they return, and that the page shows their code.

pytest tests/rewards/test_own.py
"""

import importlib.util
import inspect
import re

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("my_rewards", ROOT / "examples/my_rewards.py")
own = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own)


def test_what_they_return():
    assert own.length([[0] * 100, [0] * 200]) == [0.0, pytest.approx(-0.1)]
    assert own.one_number(["12", " -3 ", "about 12", ""]) == [1.0, 1.0, 0.0, 0.0]
    question = "Write a sum that makes 24 with the numbers 3, 5 and 9."
    texts = ["9 + 3 * 5", "3*5+9", "3*8", "24", "__import__('os')", "9/0+3+5"]
    assert own.makes_target([question] * 6, texts, ["24"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert own.makes_target(["Say hello."], ["hello"], ["24"]) == [None]


def test_the_page_has_the_bodies_of_the_functions():
    page = (ROOT / "docs/own_rewards.md").read_text()
    for function in (own.length, own.one_number, own.makes_target):
        body = inspect.getsource(function).splitlines()[-1].strip()
        assert f"def {function.__name__}(" in page and body.replace(", strict=True", "") in page


def test_the_page_names_what_arrives():
    """Each argument of the table is one that the trainer passes."""
    from rl_soft.train.reward_functions import PASSED

    table = (ROOT / "docs/own_rewards.md").read_text().partition("| argument |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named <= PASSED and PASSED - named == {"environments"}
