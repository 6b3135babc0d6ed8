"""RL fine-tuning of language models whose thoughts are soft tokens."""

__version__ = "0.1.0"
