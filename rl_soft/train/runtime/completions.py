"""`log_completions`: a few completions of a rollout as a table that fits a screen. All of them are in completions/."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

ROWS = 4  # where num_completions_to_print says nothing
HEAD, TAIL = 100, 80  # characters of a text that are shown


def show_completions(
    step: int,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Mapping[str, Sequence[float]],
    rows: int | None,
    console: Console | None = None,
) -> None:
    """Print a table of completions, of different prompts where there are such.

    Args:
        prompts, completions: n texts, or lists of chat messages.
        numbers: name -> n values, a column each: rewards, the advantage.
        rows: how many; None for `ROWS`.
        console: where to; stdout if absent.
    """
    n = len(completions)
    shown = min(n, ROWS if rows is None else rows)
    if shown < 1:
        return
    table = Table(title=f"step {step}: {shown} of {n} completions", title_justify="left", expand=True)
    table.add_column("prompt", ratio=2)
    table.add_column("completion", ratio=3)
    for name in numbers:
        table.add_column(name, justify="right")
    for i in (j * n // shown for j in range(shown)):
        values = (float(column[i]) for column in numbers.values())
        cells = ["-" if math.isnan(value) else f"{value:.2f}" for value in values]
        table.add_row(Text(short(prompts[i])), Text(short(completions[i])), *cells)
    (console or Console()).print(table)


def short(entry: Any) -> str:
    """The text of an entry, or of its last message, in one line; the middle of a long one is left out."""
    text = str(entry[-1].get("content", "")) if isinstance(entry, list) and entry else str(entry)
    text = " ".join(text.split())
    return text if len(text) <= HEAD + TAIL + 5 else f"{text[:HEAD]} ... {text[-TAIL:]}"
