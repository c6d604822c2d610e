"""Text of a mathematical answer before it is parsed: wrappings away, numbers and words written in one way.

The rules, in order: typography (full-width signs, dashes, superscripts, `½`), wrappings (`$`, `\\boxed`,
"The answer is", colours and sizes), words, numerals with a base, scale words, repeating decimals, thousands,
mixed numbers. Every pattern is linear in the text.
"""

from __future__ import annotations

import re
from fractions import Fraction
from unicodedata import normalize

_SYMBOLS = str.maketrans(
    {"−": "-", "×": "\\times ", "÷": "\\div ", "·": "\\cdot ", "∞": "\\infty ", "√": "\\sqrt ", "∈": "\\in "}
    | {"°": "^\\circ ", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "∪": "\\cup ", "∩": "\\cap "}
    | {"∅": "\\emptyset ", "ℝ": "\\mathbb{R}", "∧": "\\land ", "∨": "\\lor ", "∕": "/", "⁄": "/", "∶": ":"}
    | {"…": "\\ldots "}
    | dict.fromkeys("€£¥₹", "")
)
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+")
_SUBSCRIPT = re.compile("[₀-₉]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_DASH = re.compile(r"(?<!\d)(?<!\d )[‐‑‒–—]|[‐‑‒–—](?! ?\d)")
"""A dash between two numbers is a range, and no minus."""
_OVERLINED = re.compile("(?:\\d[\u0304\u0305])+")
_DOTTED = re.compile("(\\d)\u0307")

_GROUP = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+\})*+)\}"
"""Braces with their content, three more levels inside."""
_DECORATION = re.compile(
    r"\\(?:(?:text)?color\s*\{[^{}]*\}|colorbox\s*\{[^{}]*\}|fcolorbox\s*\{[^{}]*\}\s*\{[^{}]*\}"
    rf"|underline|uline|boldsymbol|bm|pmb|mathbf)\s*{_GROUP}"
)
_SIZE = re.compile(
    r"\\(?:color\s*\{[^{}]*\}|(?:tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge"
    r"|displaystyle|textstyle|bf|boldmath)(?![a-zA-Z]))\s*"
)
_NUMBER_IN_TEXT = re.compile(r"\\(?:text|mathrm|mbox)(?:bf|it|rm|normal)?\s*\{\s*(-?[\d.,]*\d)\s*\}")
_UPRIGHT = re.compile(r"\\(?:mathrm|operatorname)\s*\{\s*([ei])\s*\}")
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"))
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\{(?!\{)")
_LEAD_IN = re.compile(r"^(?:the\s+)?(?:final\s+)?answer(?:\s+is\b|\s*[:=])\s*:?", re.IGNORECASE)

_WORDS = re.compile(
    r"(^[(\[]?|^\\\{|[,;=])\s*(\\(?:text|mbox|mathrm)(?:bf|it|rm|normal)?\s*\{\s*)?([A-Za-z][A-Za-z ]*+)"
    r"(?(2)\})(?=\s*(?:$|[,;=)\]]|\\\}$))"
)
_IS_WORD = re.compile(
    r"(?i)(?=.*[aeiou])(?=.*[a-z]{3}|no$|on$)(?!.*\b(?:and|or|pi|inf|infinity|percent(?:age)?|pct)\b)"
)
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z])\s+(?:and|or)\s+(?=[A-Za-z])")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(
    r"(?<=[\d}$])(?:[\s~]|\\[ ,;])*+(\\(?:text|mathrm|mbox)\s*\{\s*)?"
    rf"((?:(?:{'|'.join(_SCALES)})s?\b\s*)+)(?(1)(\}}?))"
)

NAMED = r"(?:[^=+\-*/<>,;()]*=\s*)?"
"""An optional name with its equals sign."""
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASE = (
    r"\s*_\s*(?:\{\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:base\s*\}?\s*)?(\d\d?|[a-z]+)\s*\}?\s*\}"
    r"|\\text\s*\{\s*([a-z]+)\s*\}|(\d))"
)
_NUMERAL = re.compile(rf"{NAMED}\(?([0-9]+|[0-9A-F]{{2,}})\)?{_BASE}")
_INNER_NUMERAL = re.compile(rf"(?<![\w.^}}])([0-9]+){_BASE}")
_BASE_IN_WORDS = re.compile(r"(?<=[\dA-F)])\s*+(?:\\text\s*\{)?[\s(]*+base\s*\}?\s*(\w+)[\s)}]*$")
_INDEXED_NUMBER = r"(?<![\w.^}])[0-9.]+\)?\s*_"

_WHOLE = r"(?<![\d.])(\d{0,99})\."
_REPEATING = re.compile(
    rf"{_WHOLE}(\d{{0,99}})(?:\{{?\\(?:overline|bar)\s*(?:\{{\s*(\d{{1,99}})\s*\}}|(\d))\}}?"
    r"|\\dot\s*(?:\{(\d)\}|(\d))(?:(\d{0,99})\\dot\s*(?:\{(\d)\}|(\d)))?|(\(\d{1,99}\)))"
)
_GOES_ON = re.compile(
    rf"{_WHOLE}(?:(\d{{0,2}}?)(\d{{1,3}}?)\3+|(\d{{4,6}})\4+)(?:\.\.\.+|\s*\\[lc]?dots[cb]?(?![a-z]))"
)

_SPACE = r"(?:\\[,;:! ]|~|\s|\{,\})"
_NUMBER_BEGINS = r"(?<![\w.,^\\])(?<!frac )(?<!binom )"
_THOUSANDS = re.compile(rf"{_NUMBER_BEGINS}\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)")
_MIXED_NUMBER = re.compile(rf"{_NUMBER_BEGINS}(\d+){_SPACE}+(\d+)\s*/\s*(\d+)(?![\d.])")
_FACTOR = r"\(\s*-?[\d.]+\s*\)|\\[dt]?binom"
_PRODUCT = re.compile(rf"((?<![\w.\\])\d[\d.]*(?=\s*(?:{_FACTOR}))|\)(?=\s*(?:{_FACTOR}|\\[dtc]?frac)))")
_EXPONENT = re.compile(r"(?<=\d)[eE]([-+]?\d+)(?![\d.])")
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.])")
_NO_NUMBER = re.compile(
    rf"{_NUMBER_BEGINS}\d[\d.]*{_SPACE}+\d|\.\d+\.\d|\^\s*(?:-?\w+|\{{[^{{}}]*\}})\s*\^|{_INDEXED_NUMBER}"
)

_OPTION = re.compile(
    r"(?:\\(?:text|mathrm|mathbf)(?:bf|rm)?\s*\{\s*)?(?:\(([A-J])\)|([A-J])[.):](?=[\s\\}]))\s*\}?"
    r"(?:[\s~]|\\[ ,;:]|\\q?quad)*+(?!\)|[-+]?\(?[A-J]\)|[_^+*/=]|\\(?:cup|cap|cdot|times)\b)(.+)",
    re.DOTALL,
)
_LETTER = re.compile(r"(?:\\(?:text|mathrm|mathbf)(?:bf|rm)?\s*\{\s*)?\(?([A-J])\)?\.?\s*\}?")


def plain_latex(text: str) -> str | None:
    """Returns `text` without its wrapping, numbers and words written in one way; None where a number in it
    is not a definite one."""
    text = unwrap(plain_signs(text)).replace("\\left(", "(").replace("\\right)", ")")
    for other, plain in (("\\varnothing", "\\emptyset"), ("\\colon", ":"), ("{:}", ":")):
        text = text.replace(other, plain)
    # math-verify takes these for units and drops them: 2i is 2 to it, and 1 - 1/e is 1 + 1/e.
    text = _UPRIGHT.sub(r"\1 ", text)
    text = _WORDS.sub(_word, _BETWEEN_WORDS.sub(", ", text))
    text = _BASE_IN_WORDS.sub(r"_{\1}", _SCALE.sub(_power_of_ten, text))
    if numeral(text):
        return text
    text = _INNER_NUMERAL.sub(lambda match: str((numeral(match[0]) or match)[0]), text)
    text = _GOES_ON.sub(_fraction, _REPEATING.sub(_fraction, text))
    text = _THOUSANDS.sub(lambda match: re.sub(_SPACE, "", match[0]), text)
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = _PRODUCT.sub(r"\1 \\times ", text)
    text = _EXPONENT.sub(r" \\times 10^{\1}", text)
    text = _BARE_POINT.sub("", text).strip()
    return None if _NO_NUMBER.search(text) else text


def plain_signs(text: str) -> str:
    """Returns `text` with LaTeX for full-width and mathematical characters."""
    if text.isascii():
        return text
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{normalize('NFKC', match[0])}}}", text)
    text = _SUBSCRIPT.sub(lambda match: f"_{{{normalize('NFKC', match[0])}}}", text)
    text = _VULGAR.sub(lambda match: f"\\frac{{{normalize('NFKC', match[0]).replace('⁄', '}{')}}}", text)
    text = normalize("NFKC", text.translate(_SYMBOLS)).translate(_SYMBOLS)
    text = _OVERLINED.sub(lambda match: f"\\overline{{{match[0][::2]}}}", text)
    return _DASH.sub("-", _DOTTED.sub(r"\\dot{\1}", text))


def unwrap(text: str) -> str:
    """Returns `text` without `$`, `\\boxed{}`, colours, sizes and "The answer is" around it."""
    before = None
    while text != before:
        before = text
        text = _NUMBER_IN_TEXT.sub(r"\1", _SIZE.sub("", _DECORATION.sub(r"\1", text)))
        text = _LEAD_IN.sub("", text.strip(), count=1).strip()
        if text[-1:] in (".", ",", ";", ":") and text[-2:-1] not in (".", "\\"):
            text = text[:-1]
        for left, right in _WRAPPINGS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner
        text = _unbox(text)
    return text


def _unbox(text: str) -> str:
    match = _BOX.match(text)
    if match is None or not text.endswith("}"):
        return text
    inner, depth = text[match.end() : -1], 0
    if match[0] == "{" and "," in inner:  # a set
        return text
    for brace in re.findall(r"(?<!\\)[{}]", inner):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return text
    return inner


def _word(match: re.Match[str]) -> str:
    """Returns a word as one name: the grammar reads the product of its letters."""
    word = match[3]
    return f"{match[1]}\\variable{{{word.replace(' ', '')}}}" if _IS_WORD.match(word) else match[0]


def _power_of_ten(match: re.Match[str]) -> str:
    zeros = sum(_SCALES[word.removesuffix("s")] for word in match[2].split())
    return f" \\times 10^{{{zeros}}}" + (match[1] if match[1] and not match[3] else "")


def numeral(text: str) -> tuple[int, int] | None:
    """Returns (value, base) of `101_2`, `(101)_{2}`, `101_{\\text{two}}` or `1F_{16}`, else None."""
    match = _NUMERAL.fullmatch(text)
    written = match and (match[2] or match[3] or match[4])
    if not match or not written:
        return None
    try:
        base = _BASES.get(written) or int(written)
        return int(match[1], base), base
    except ValueError:
        return None


def _fraction(match: re.Match[str]) -> str:
    """Returns a repeating decimal as a fraction; `0.5(3)` is one only where nothing else is written."""
    whole, before, *rest = (group or "" for group in match.groups())
    repeated = "".join(rest)
    if repeated.startswith("("):
        if before and match[0] != match.string.lstrip("-"):
            return match[0]
        repeated = repeated[1:-1]
    if not repeated:
        return match[0]
    nines = (10 ** len(repeated) - 1) * 10 ** len(before)
    value = Fraction(int(whole + before + repeated) - int(f"0{whole}{before}"), nines)
    return str(value) if value.denominator == 1 else f"\\frac{{{value.numerator}}}{{{value.denominator}}}"


def option_of(text: str) -> tuple[str, str]:
    """Returns the letter and the text of a choice: `(A)\\ 12` gives ("A", "12"), `(A)` gives ("A", ""), and
    any other text ("", text)."""
    text = unwrap(text)
    if match := _LETTER.fullmatch(text):
        return match[1], ""
    match = _OPTION.fullmatch(text)
    return (match[1] or match[2], match[3]) if match else ("", text)
