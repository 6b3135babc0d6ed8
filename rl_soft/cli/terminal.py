"""Completions in a terminal: a soft thought is its strongest piece, coloured by the entropy it was made at.

    Which is larger, 9.9 or 9.11?
       1   0.61 nats  To .84            The .09           ␣First .07
       2   0.02 nats  ␣compare .99
    #### 9.9
    2 thoughts, ended by the cap, entropy 0.32 nats, 3 answer tokens, finished

Or, with `show` 0 and where thoughts are tokens, running text. Colours are left out where stdout is no terminal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from rl_soft.evaluation.generation import Completion, Mixture
from rl_soft.evaluation.records import GREEDY

# Nats below which a thought has the colour: certain is green, open is red.
COLOURS = ((0.1, "green"), (0.5, "cyan"), (1.0, "yellow"), (2.0, "magenta"), (float("inf"), "red"))
ENTRY = 17  # cells of an entry, so that columns line up where pieces are short
ENDS = {"cap": "the cap", "cold": "the cold stop", "eos": "end of text", "failed": "logits that are not finite"}


def colour(entropy: float) -> str:
    return next((name for bound, name in COLOURS if entropy < bound), "red")


def visible(piece: str) -> str:
    """A token in one cell row: spaces at its ends and what does not print are shown, so that nothing reaches the
    terminal but what it shows."""
    body = piece.strip(" ")
    left = len(piece) - len(piece.lstrip(" ")) if body else len(piece)
    right = len(piece) - left - len(body)
    return "␣" * left + "".join(c if c.isprintable() else repr(c)[1:-1] for c in body) + "␣" * right


def printable(text: str) -> str:
    """Running text with its line ends; other control characters, escape sequences among them, as their names."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Pieces:
    """The text of ids that come one at a time: a piece is given once its characters are whole."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self.decode, self.ids = decode, list[int]()
        self.start = self.read = 0  # of the ids decoded together, and of those given already

    def add(self, token: int) -> str:
        """The text that `token` completes; empty in the middle of a character."""
        self.ids.append(token)
        before, now = self.decode(self.ids[self.start : self.read]), self.decode(self.ids[self.start :])
        if now.endswith("\ufffd"):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before) :]


class Terminal:
    """Prints completions as they come.

    Args:
        decode: ids -> text.
        show: entries of a thought, one thought per line; 0 prints running text.
        end_of_thinking: the text that a thought's end is named by.
        console: where to; stdout if absent.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], show: int, end_of_thinking: str, console: Console | None = None
    ) -> None:
        self.decode, self.show, self.end_of_thinking = decode, show, end_of_thinking
        self.console = console or Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.printed = 0  # whole completions
        self._fresh()

    def _fresh(self) -> None:
        self.thoughts = 0
        self.resting = False  # past the thoughts
        self.pieces = Pieces(self.decode)

    def _print(self, text: str, style: str | Style = "", end: str = "") -> None:
        self.console.print(Text(text, style=style), end=end, soft_wrap=True)

    def question(self, text: str, name: str = "") -> None:
        self._print(f"{name}{printable(text)}", "bold", "\n")

    def position(self, kind: str, mixture: Mixture) -> None:
        """One position, right after it was made: kind thought, fed (by the layout) or answer."""
        if kind == "thought":
            self.thoughts += 1
            if self.show:
                self._line(mixture)
            else:
                self._print(printable(self.pieces.add(mixture.ids[0])), colour(mixture.entropy))
        else:
            self._rest(mixture.ids[0], "bold" if kind == "answer" else "dim")

    def _rest(self, token: int, style: str) -> None:
        """A token after the thoughts."""
        if not self.resting:
            self.resting, self.pieces = True, Pieces(self.decode)
            self._print("" if self.show or not self.thoughts else "\n")
        self._print(printable(self.pieces.add(token)), style)

    def _line(self, mixture: Mixture) -> None:
        line = Text(f"{self.thoughts:4d}  ", style="dim")
        line.append(f"{mixture.entropy:5.2f} nats  ", style=Style(color=colour(mixture.entropy)))
        for j, (token, weight) in enumerate(zip(mixture.tokens, mixture.weights, strict=True)):
            if j == self.show or (j and weight < 0.005):
                break
            piece, number = visible(token), f"{weight:.2f}".lstrip("0")
            line.append(piece, style=Style(color=colour(mixture.entropy), bold=True) if j == 0 else "")
            line.append(f" {number}" + " " * max(2, ENTRY - cell_len(piece) - len(number)), style="dim")
        line.rstrip()
        self.console.print(line, soft_wrap=True)

    def end(self, done: Completion) -> None:
        """What is to be said of a completion whose positions have been shown."""
        n, answered = len(done.thoughts), len(done.answer_ids)
        parts = []
        if n or done.thinking_end == "failed":
            how = ENDS.get(done.thinking_end, repr(self.end_of_thinking))
            parts += [f"{n} thought{'s' * (n != 1)}, ended by {how}"]
        if n:
            parts += [f"entropy {sum(mixture.entropy for mixture in done.thoughts) / n:.2f} nats"]
        parts += [f"{answered} answer token{'s' * (answered != 1)}", "finished" if done.finished else "cut off"]
        at_margin = self.show and self.thoughts and not self.resting
        self._print(("" if at_margin else "\n") + ", ".join(parts), "dim", "\n")
        self._fresh()

    def whole(self, done: Completion) -> None:
        """One of several completions, which are not streamed."""
        if self.printed:
            self._print("", end="\n")
        self.printed += 1
        sample = "greedy" if done.sample == GREEDY else f"sample {done.sample}"
        self.question(done.prompt, f"[{done.prompt_id}, {sample}] ")
        for mixture in done.thoughts:
            self.position("thought", mixture)
        rest, answered = done.ids[len(done.thoughts) :], len(done.answer_ids)
        fed = len(rest) - answered
        if rest[fed:] != done.answer_ids:  # the last position is one where logits were not finite
            fed -= 1
        for token in rest[:fed]:
            self._rest(token, "dim")
        for token in done.answer_ids:
            self._rest(token, "bold")
        self.end(done)


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """ids -> text without special tokens."""
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))
