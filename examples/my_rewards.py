"""Three rewards of one's own, explained in docs/own_rewards.md. They need neither torch nor this package.

From this folder: rl-soft check grpo_gumbel --rewards '[my_rewards.length]'
"""

from __future__ import annotations

import ast
import re
from typing import Any


def length(completion_ids: list[list[int]], *, free: int = 100, cost: float = 0.001, **columns: Any) -> list[float]:
    """-cost per token above `free`."""
    return [-cost * max(0, len(ids) - free) for ids in completion_ids]


def one_number(answer_text: list[str], **columns: Any) -> list[float]:
    """1 where the answer is one whole number and nothing else."""
    return [float(re.fullmatch(r"\s*-?\d+\s*", text) is not None) for text in answer_text]


def makes_target(prompts: list[str], answer_text: list[str], answer: list[str], **columns: Any) -> list[float | None]:
    """1 for a sum over the numbers of the question that makes `answer`, such as 3*7+3 for 24."""
    return [judge(question, text, target) for question, text, target in zip(prompts, answer_text, answer, strict=True)]


def judge(question: str, text: str, target: str) -> float | None:
    """None where the question gives no numbers: then there is nothing to judge."""
    given = sorted(re.findall(r"\d+", question.replace(target, "", 1)))
    if not given:
        return None
    used = sorted(re.findall(r"\d+", text))
    try:
        return float(used == given and value(ast.parse(text.strip(), mode="eval").body) == float(target))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0


def value(node: ast.expr) -> float:
    """The value of a sum of numbers. Raises ValueError for anything else: what a model writes is never run."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp):
        left, right = value(node.left), value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            return left / right
    raise ValueError(ast.dump(node))
