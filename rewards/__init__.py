"""Rule-based rewards; importable without torch, usable under stock TRL as `rewards.accuracy.math_accuracy`."""

from rewards.accuracy import math_accuracy
from rewards.puzzles import puzzle_accuracy
from rewards.shaping import CosineScaled, LengthCost, Overlong, StrictFormat, ThoughtCost

__all__ = ["CosineScaled", "LengthCost", "Overlong", "StrictFormat", "ThoughtCost", "math_accuracy", "puzzle_accuracy"]
