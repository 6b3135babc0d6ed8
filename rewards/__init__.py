"""Rule-based rewards; importable without torch, usable under stock TRL as `rewards.accuracy.math_accuracy`."""

from rewards.accuracy import math_accuracy
from rewards.puzzles import puzzle_accuracy
from rewards.shaping import CosineScaled, LengthCost, Overlong, StrictFormat, ThoughtCost, relative_length
from rewards.style import CodeFormat, Repetition, answer_format, reasoning_steps, tag_count, think_format

__all__ = [
    "CodeFormat",
    "CosineScaled",
    "LengthCost",
    "Overlong",
    "Repetition",
    "StrictFormat",
    "ThoughtCost",
    "answer_format",
    "math_accuracy",
    "puzzle_accuracy",
    "reasoning_steps",
    "relative_length",
    "tag_count",
    "think_format",
]
