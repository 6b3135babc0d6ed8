"""Whether the rows of a data set fit a model: its positions, and the characters that its tokenizer knows."""

from __future__ import annotations

from collections.abc import Sequence

from rl_soft.data.row import Row
from rl_soft.thoughts.layout import Layout

SHOWN = 20  # ids of rows in a message


def check_rows(rows: Sequence[Row], layout: Layout, context: int | None, dataset: str) -> None:
    """`check_lengths` and `check_characters`."""
    check_lengths(rows, layout, context, dataset)
    check_characters(rows, layout, dataset)


def check_lengths(rows: Sequence[Row], layout: Layout, context: int | None, dataset: str) -> None:
    """Raises ValueError, with the row, for questions that leave a model without positions for thoughts and answer.

    Args:
        context: positions of the model; None where its configuration names none.
    """
    if context is None:
        return
    lengths = {row.id: len(layout.prompt_ids(row.question)) + layout.max_completion_length for row in rows}
    long = [name for name, length in lengths.items() if length > context]
    if long:
        raise ValueError(
            f"dataset {dataset}, row {long[0]}: question, thoughts and answer may take {lengths[long[0]]} tokens, and "
            f"the model has {context} positions; so may {len(long) - 1} more rows: lower num_thoughts or "
            f"max_answer_tokens, or leave them out with dataset_options: {{drop: [{', '.join(long[:SHOWN])}]}}"
        )


def check_characters(rows: Sequence[Row], layout: Layout, dataset: str) -> None:
    """Raises ValueError, with the character and the row, for texts that the tokenizer cannot spell: a model would read
    an unknown token there, and could never write the answer."""
    unknown = layout.tokenizer.unk_token_id
    if unknown is None:
        return
    for row in rows:
        for name, text in (("question", row.question), ("answer", row.answer), *(("steps", s) for s in row.steps)):
            if unknown in layout.encode(text):
                missing = next((c for c in text if unknown in layout.encode(c)), text)
                raise ValueError(
                    f"dataset {dataset}, row {row.id}: the tokenizer has no token for {missing!r}, which stands in "
                    f"the {name} {text!r:.60}; put it into vocabulary, or take another model"
                )
