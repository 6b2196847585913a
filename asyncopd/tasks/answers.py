r"""Final answers: finding them in running text and deciding whether two are equal, exactly.

A final answer is what follows `####`, else the last `\boxed{...}`, else the last number. Numbers are compared as
fractions, so 70,000 = $70000 = 70000.00 and 1/2 = 0.5, while 0.333 ≠ 1/3. No function here raises on any text.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MARKER = re.compile(r"####[ \t]*([^\n]*)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+"
# A minus after a word, a digit or a bracket subtracts. Digits glued to a word in front are part of a name, as in v2.0;
# units may be glued behind. The end refuses to stop inside a longer numeral, or inside a date such as 1/2/2024.
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-−+])?(?:\\?\$[-−]?)?"
    rf"(?<!\w)(?<!\w\.)(?<!/)(?:{_UNSIGNED})(?:[ \t]*/[ \t]*(?:{_UNSIGNED}))?"
    r"(?!\.?[0-9]|,[0-9]{3}(?![0-9])|[ \t]*/[ \t]*[0-9])"
)
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_MAX_NUMBER_CHARS = 200
"""Longer numerals are compared as text: converting them costs quadratic time, and Python refuses 4300 digits."""


def extract_answer(text: str) -> str | None:
    """The final answer as written, trimmed; None when the text has neither marker, box nor number.

    The first `####` counts, because models that ramble on begin another question after it; the last box counts,
    because earlier ones hold intermediate results.
    """
    for marked in _MARKER.finditer(text):
        if marked[1].strip():
            return marked[1].strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    # From the end, because most of a response is reasoning full of numbers.
    for line in reversed(text.splitlines()):
        numbers = _NUMBER.findall(_without_fractions(line))
        if numbers:
            return str(numbers[-1])
    return None


def answers_match(found: str | None, expected: str | None) -> bool:
    """Are the two answers, as `extract_answer` gives them, equal after `normalised`? False when one is missing."""
    return found is not None and expected is not None and normalised(found) == normalised(expected)


def normalised(answer: str) -> str:
    """Canonical form: `n` or `n/d` in lowest terms for numbers, else the text in lower case with single blanks.

    A number may carry $, %, thousands commas, a trailing full stop, or words around it if it is the only number.
    """
    text = _without_latex(answer).strip().rstrip(".").strip()
    numbers = list(_NUMBER.finditer(text))
    if len(numbers) == 1 and _only_words_around(text, numbers[0]):
        value = _value(numbers[0][0])
        if value is not None:
            return str(value)
    return " ".join(text.casefold().split())


def _value(number: str) -> Fraction | None:
    plain = re.sub(r"[\s,$\\+]", "", number).replace("−", "-")
    numerator, _, denominator = plain.partition("/")
    if len(plain) > _MAX_NUMBER_CHARS:
        return None
    try:
        return Fraction(numerator) / Fraction(denominator or "1")
    except (ValueError, ZeroDivisionError):
        return None


def _only_words_around(text: str, number: re.Match[str]) -> bool:
    # "x = 5" and "18 dollars" mean the number; "5x", "2*(3)" and "10-x" are expressions.
    glued = text[number.end() : number.end() + 1].isalnum()
    return not glued and not re.search(r"[*/^+\-−{}\\()_<>0-9]", text[: number.start()] + text[number.end() :])


def _last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{...}` whose braces close; they may nest."""
    opened = {match.end() for match in _BOXED.finditer(text)}
    if not opened:
        return None
    last: tuple[int, int] | None = None
    # One pass with a stack: a model stuck on "\boxed{" must not cost quadratic time.
    stack: list[int] = []
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            stack.append(brace.end())
        elif stack and (start := stack.pop()) in opened:
            last = max(last or (0, 0), (start, brace.start()))
    return text[slice(*last)] if last else None


def _without_latex(text: str) -> str:
    text = _without_fractions(_WRAPPER.sub(r" \1 ", text))
    text = re.sub(r"\\[,;:! ]|[~%]|\\(?:left|right)(?![A-Za-z])", "", text.replace(r"\%", "%").replace(r"\$", "$"))
    # $...$ around the whole is math mode; a $ in front of a number is money. Neither changes the value.
    return text.replace("$", "")


def _without_fractions(text: str) -> str:
    r"""`\frac{1}{2}` as 1/2 and `1{,}234` as 1,234."""
    text = text.replace("{,}", ",")
    return _FRAC.sub(lambda frac: f"{frac[1] or frac[2] or ''}/{frac[3] or frac[4] or ''}", text)
