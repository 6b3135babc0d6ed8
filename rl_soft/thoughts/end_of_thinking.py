"""When explicit thinking has said its end: the text decides, not the ids.

A tokenizer spells one text in many ways. `####` alone is one token, and models write ` ####` or `.####`, which are
others. So a row counts how many characters of the end its thoughts have said so far, and a table says what the count
becomes after each token (the automaton of Knuth, Morris and Pratt over characters). The table is made once from the
vocabulary and is looked up on the device. Text of a token beyond the end belongs to the answer.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_MADE: weakref.WeakKeyDictionary[Any, dict[tuple[str, int], EndOfThinking]] = weakref.WeakKeyDictionary()


class EndOfThinking:
    """The end text of one tokenizer; `of` makes it once per tokenizer and text.

    Attributes:
        length: L, characters of the end.
        texts: the text of each id, as it stands behind other text.
        table: (L + 1, V) int16: characters of the end that are said after a token, by those said before it; L: all.
    """

    def __init__(self, text: str, tokenizer: Any) -> None:
        self.text, self.length, self.texts = text, len(text), token_texts(tokenizer)
        classes = {c: i + 1 for i, c in enumerate(dict.fromkeys(text))}  # 0: any other character
        step = _automaton([classes[c] for c in text], len(classes) + 1)  # (L + 1, classes)
        table = np.tile(np.arange(self.length + 1, dtype=np.int16)[:, None], (1, len(self.texts)))
        # A token without a character of the end says nothing of it, whatever came before.
        plain = np.array([bool(t) and not classes.keys() & set(t) for t in self.texts])
        table[: self.length, plain] = 0
        for token in np.flatnonzero(~plain):
            for character in self.texts[token]:
                table[:, token] = step[table[:, token], classes.get(character, 0)]
        self.table = torch.from_numpy(table)

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> EndOfThinking:
        made, key = _MADE.setdefault(tokenizer, {}), (text, len(tokenizer))
        if key not in made:
            made[key] = cls(text, tokenizer)
        return made[key]

    def split(self, ids: Sequence[int]) -> tuple[int, str] | None:
        """How many ids it took to say the end, and the text of the last one beyond it; None where it is not said."""
        said, rows = 0, self.table.shape[1]
        for i, token in enumerate(ids):
            before, said = said, int(self.table[said, token]) if token < rows else 0
            if said == self.length:
                return i + 1, self._beyond(before, self.texts[token])
        return None

    def _beyond(self, said: int, text: str) -> str:
        """What a token's text has behind the end that it completes."""
        for cut in range(len(text) + 1):
            if (self.text[:said] + text[:cut]).endswith(self.text):
                return text[cut:]
        return ""


def token_texts(tokenizer: Any) -> list[str]:
    """The text that each id adds behind other text; decoding an id alone would drop the space before a word."""
    anchor = (tokenizer.encode("a", add_special_tokens=False) or [0])[-1]
    kwargs = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = str(tokenizer.decode([anchor], **kwargs))
    pairs = tokenizer.batch_decode([[anchor, i] for i in range(len(tokenizer))], **kwargs)
    return [
        text[len(before) :] if text.startswith(before) else str(tokenizer.decode([i], **kwargs))
        for i, text in enumerate(pairs)
    ]


def _automaton(end: list[int], classes: int) -> np.ndarray:
    """(L + 1, classes) int16: the next number of matched characters; the last row stays at L."""
    L = len(end)
    step = np.zeros((L + 1, classes), dtype=np.int16)
    step[0, end[0]] = 1
    fallback = 0  # the state that the characters behind the first one lead to
    for state in range(1, L):
        step[state] = step[fallback]
        step[state, end[state]] = state + 1
        fallback = step[fallback, end[state]]
    step[L] = L
    return step
