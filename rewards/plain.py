r"""One spelling for the characters of an answer: Unicode as ASCII or LaTeX, and LaTeX without what only sets type."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_SYMBOLS = {
    **{
        "⁄": "/",
        "∕": "/",
        "≈": r"\approx ",
        "≠": r"\ne ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "×": r"\times ",
        "⨯": r"\times ",
    },
    **{
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": r"\div ",
        "±": r"\pm ",
        "∞": r"\infty ",
        "°": r"^\circ ",
        "∶": ":",
        "…": r"\ldots ",
    },
    **{
        "∪": r"\cup ",
        "∈": r"\in ",
        "∅": r"\emptyset ",
        "∨": r"\lor ",
        "→": r"\to ",
        "⇒": r"\Rightarrow ",
        "∛": r"\sqrt[3]",
        "⟨": r"\langle ",
    },
    **{"⟩": r"\rangle ", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "‘": "'", "’": "'", "，": ",", "。": ". "},
    **{"¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "⅕": " 1/5 ", "⅖": " 2/5 ", "⅗": " 3/5 "},
    **{"⅘": " 4/5 ", "⅙": " 1/6 ", "⅚": " 5/6 ", "⅛": " 1/8 ", "⅜": " 3/8 ", "⅝": " 5/8 ", "⅞": " 7/8 "},
    **dict.fromkeys("−–‒‐‑﹣－", "-"),
    # without width: joiners, marks of direction, the soft hyphen
    **dict.fromkeys(
        "\xad\u200b\u200c\u200d\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff", ""
    ),
}
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau upsilon"
)
_GREEK += " phi chi psi omega"
_SYMBOLS |= {chr(0x3B1 + i): rf"\{name} " for i, name in enumerate(_GREEK.split())}
_CHARACTERS = str.maketrans(_SYMBOLS)
_THIN_THOUSANDS = re.compile(r"(?<=[0-9])[\xa0\u2007\u2009\u202f](?=[0-9]{3}(?![0-9]))")
_SET_THOUSANDS = re.compile(r"(?<=[0-9])\\[,;:!]\s?(?=[0-9]{3}(?![0-9]))")
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]{1,9}")
_DIGITS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_MINUS_LIKE = re.compile(r"[—―](?=[0-9.$])(?<![0-9A-Za-z\s].)|(?<=[0-9])[—―](?=[0-9])")
_MINUS = re.compile(r"(?<=[A-Za-z:=]\s)−\s+(?=[0-9.$])")  # unlike a hyphen it is a minus behind words, too
_ROOT = re.compile(r"√\s?(?:([0-9]+(?:\.[0-9]+)?|[A-Za-z])|\(([^()]{1,100})\))")


def plain(text: str) -> str:
    """The text with typographic characters replaced by ASCII or LaTeX; a dash that stands between words stays `—`."""
    if not text.isascii():
        text = _THIN_THOUSANDS.sub("", text)
        text = _SUPERSCRIPTS.sub(lambda match: "^{" + match[0].translate(_DIGITS) + "}", text)
        text = _MINUS.sub("-", _MINUS_LIKE.sub("-", text))
        text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
        text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text).replace("√", r"\sqrt ")
    if "\\" in text:
        text = _SET_THOUSANDS.sub("", text)
    return text.replace("{,}", ",")


_TEXT = r"text(?:bf|it|rm|normal|sf|tt)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|mbox|hbox|emph|operatorname|underline"
_TEXT += "|ensuremath|mathcal|mathop|mathord|boxed|fbox"
_UNWRAP = re.compile(rf"\\({_TEXT})\s?\{{((?:[^{{}}]|\{{[^{{}}]*\}})*+)\}}")
_DOLLAR = re.compile(r"(?<![A-Za-z])(?:US|CA?|AU?|NZ|HK|S|R|NT|Mex)\s?\\?\$")
_COMMA_DOLLAR = re.compile(r"(?<![0-9,.])([0-9]{1,9}),([0-9]{1,2})(?=\s?\\?\$)")
_COLOR = re.compile(r"\\(?:textcolor|color)\s?\{[A-Za-z]{1,20}\}")
_NOISE = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?|bf|rm|it|tt|sf|bm|tiny|small|large|Large|LARGE|huge|Huge|limits"
    r"|normalsize|footnotesize)(?![A-Za-z])|\\[hv]?(?:space|phantom)\*?\s?\{[^{}]*\}"
    r"|\\(?:begin|end)\{(?:aligned|align|gathered|equation|split)\*?\}&?|(?<!\\)\\[!()\[\]](?![A-Za-z])"
)
_SPACE = re.compile(r"(?<!\\)\\[,;:> ]|~(?![0-9])|(?<![0-9])~|~(?=[0-9]{1,9}/[0-9])|\\q?quad(?![A-Za-z])|\$")
_FRAC_STYLE = re.compile(r"\\[dtc]frac(?![A-Za-z])")
_OVER = re.compile(r"\{\s?([^{}\\]{1,50}|\\[a-z]{1,9})\s?\\over(?![A-Za-z])\s?([^{}\\]{1,50}|\\[a-z]{1,9})\}")
_TOP_OVER = re.compile(r"\A\s*([^{}\\]{1,50}?)\s?\\over(?![A-Za-z])\s?([^{}\\]{1,50}?)\s*\Z")
_THIN_COMMA = re.compile(r"(?<=[0-9]),\s?\\!\s?(?=[0-9])")
_DEGREES = re.compile(r"\^\s?(?:\\circ|\{\s?\\circ\s?\})\s?")
_RESIDUE = re.compile(r"\s*\\pmod\s?(?:\{[^{}]*\}|[0-9])\s*\Z|\s*\((?:\\?mod|modulo)\s+[0-9A-Za-z]{1,20}\)\s*\Z")
_EMPTY = re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}")
_BEFORE = re.compile(  # words that may stand before an answer
    r"\s*(?:(?:(?:so|thus|therefore|hence)[\s,]+)?(?:(?:the|my|our)\s+)?(?:(?:final|correct)\s+)?answers?\s*(?:is|are|:|=)\s*:?\s*"
    r"|(?:so|thus|therefore|hence)[\s,]+|(?:it|the\s+(?:value|result|total|sum|solution))\s+(?:is|=)\s+"
    r"|\([A-E]\)\s*(?=\S)|(?:approximately|about|around|roughly|exactly|equal\s+to|\\approx(?![A-Za-z]))\s*)+",
    re.IGNORECASE,
)


def _unwrapped(command: re.Match[str]) -> str:
    content = command[2].strip()
    # A word, and a unit of one letter, is set apart from what it stands beside.
    beside = command.string[command.start() - 1 : command.start()] if command.start() else ""
    return f" {content} " if len(content) > 1 or (beside.isalnum() and content.isalpha()) else content


@lru_cache(maxsize=4096)
def unset(answer: str) -> str:
    """An answer without what carries no meaning: spacing and fonts of LaTeX, markdown, a modulus, final stops."""
    answer = _DOLLAR.sub("$", plain(answer))
    if answer.count("$") == 1:  # not a formula, as `$1,5$` is
        answer = _COMMA_DOLLAR.sub(r"\1.\2", answer)
    if "\\" in answer:
        answer = _FRAC_STYLE.sub(r"\\frac", answer.replace(r"\$", "$").replace(r"\%", "%"))
        answer = _NOISE.sub("", _COLOR.sub("", _THIN_COMMA.sub(",", answer)))
        for _ in range(3):  # nested text commands
            answer = _UNWRAP.sub(_unwrapped, answer)
        answer = _DEGREES.sub(" degrees ", _SPACE.sub(" ", _OVER.sub(r"\\frac{\1}{\2}", answer)))
        answer = _EMPTY.sub(r"\\emptyset", answer).replace(r"\not=", r"\ne ").replace(r"+\infty", r"\infty")
        answer = answer.replace(r"\langle", "(").replace(r"\rangle", ")")
        answer = _TOP_OVER.sub(r"\\frac{\1}{\2}", answer.replace(r"\lbrace", r"\{").replace(r"\rbrace", r"\}"))
        answer = answer.removesuffix("\\")
    else:
        answer = _SPACE.sub(" ", answer)
    answer = _RESIDUE.sub("", answer).replace("> =", ">=").replace("< =", "<=").strip(" \t\r\n*`~")
    if answer[:1] in "'\"" and answer[-1:] == answer[:1]:
        answer = answer[1:-1]
    return answer.rstrip(".,;:?").strip("_ \t\r\n")


@lru_cache(maxsize=4096)
def clean(answer: str) -> str:
    """An answer as `unset` gives it, without the words that may stand before it: "The answer is", "(B)", "about"."""
    answer = unset(answer)
    match = _BEFORE.match(answer)
    return answer[match.end() :] if match and match.end() < len(answer) else answer
