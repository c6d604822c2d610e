"""What people write: forms of one answer that match, and near forms of another one that do not."""

from __future__ import annotations

import pytest

from precompute.verify.math import compare
from precompute.verify.plain_numbers import plain_gold

EQUAL = r"""
equations
5                   | 5=x
5=x                 | 5
5                   | x=2+3=5
5                   | 2+3=5
5                   | f(2)=5
f(2)=5              | 5
5                   | Area = 5
12                  | P(X=2) = 12
4, 5                | AB=4, CD=5
x^2+1               | y = x^2+1
y = 2x+1            | 2x+1 = y
repeating decimals
1/3                 | 0.\overline{3}
0.\overline{3}      | \frac{1}{3}
1/3                 | 0.\bar 3
1/3                 | 0.\dot{3}
1/3                 | 0.(3)
1/3                 | 0.333...
1/3                 | 0.33\ldots
1/3                 | 0.3̅
1/3                 | 0.3̇
-1/6                | -0.1(6)
1/6                 | 0.1\overline{6}
1/7                 | 0.\dot{1}4285\dot{7}
1/7                 | 0.142857142857…
1                   | x = 0.\overline{9}
33\frac{1}{3}\%     | 33.\overline{3}\%
numerals with a base
101_2               | (101)_{2}
101_2               | 101_{\text{two}}
101_2               | 101 \text{ (base 2)}
101_2               | x = 101_2
1F_{16}             | 1F_{16}
25_{10}             | 25
11_2, 101_2         | 101_2, 11_2
times and ratios
12:00               | 12:00
3:15                | 3:15 \text{ p.m.}
3:15 \text{ PM}     | 15:15
2:3:4               | 4:6:8
2:3                 | 4 : 6
1:\sqrt{3}          | \sqrt{3}:3
7:32                | A:B = 7:32
words
left                | \text{Left}
turn left           | \text{turn left}
red, blue           | \text{blue}, \text{red}
x = left            | left
Alice and Bob       | Bob and Alice
abc                 | a \cdot b \cdot c
SRAC = LRAC         | LRAC = SRAC
xy                  | yx
scale words
5,000,000           | 5 \text{ million}
2500000             | \$2.5 \text{ million dollars}
300000              | 3 hundred thousand
intervals and inequalities
(-\infty,3)         | x<3
3 > x               | (-\infty,3)
[2,5)               | 2 \le x < 5
(-\infty,1)\cup(2,\infty) | x<1,\text{ or } x>2
x<1 or x>2          | x \in (-\infty,1) \cup (2,\infty)
x<1 \text{ or } x>2 | x>2\quad\text{or}\quad x<1
(1,3)               | x>1 \text{ and } x<3
x \neq 3            | (-\infty,3)\cup(3,\infty)
(-\infty,3)\cup(3,\infty) | \mathbb{R}\setminus\{3\}
\mathbb{R}          | (-\infty,\infty)
\{1\}\cup(2,\infty) | x = 1 \text{ or } x > 2
\{x \mid x<3\}      | x<3
|x| < 3             | (-3,3)
x>1 \text{ and } y<2 | y<2 \text{ and } x>1
roots, sets, complex numbers
\sqrt{1/n}          | 1/\sqrt{n}
\sqrt{\frac{x}{y}}  | \frac{\sqrt{x}}{\sqrt{y}}
\varnothing         | \{\}
-1                  | e^{i\pi}
e^{i\theta}         | \cos\theta + i\sin\theta
\frac{1}{i}         | -i
choices
A                   | (A)\ 12
A                   | \textbf{(A)}\ 12
A                   | A. 12
12                  | (A)\ 12
(A)\ 12             | A
(A)\ 12             | 12.0
(D) \text{the largest} | D
typography
12.5                | １２．５
-5                  | –5
x-5                 | x – 5
(1,2)               | （1，2）
-3/2                | -1½
x^{-10}             | x⁻¹⁰
x_1                 | x₁
50\%                | 50％
5                   | \boxed{\large 5}
5                   | \textcolor{red}{5}
5                   | {\color{blue}5}
\frac{\sqrt2}{2}    | x = \textcolor{red}{\frac{\sqrt{2}}{2}}
5                   | \underline{\underline{5}}
5                   | \mathbf{5}
"""

DIFFERENT = r"""
equations
5                   | x+3=5
0                   | 3x-y+13=0
x+3=5               | 5
5                   | 2+2=5
5                   | 2x=5
5                   | x+y=5
6                   | n(n+1)=6
4                   | 2+2=5=4
5, 2                | x+3=5, y=2
1+1=2               | 2+3=5
x=5, y=5            | 5
numbers
0                   | 0.\overline{3}
0.3                 | 0.\overline{3}
\pi                 | 3.14159...
101_2               | 101_3
101_2               | 101
101_2               | 5
103                 | 102_2 + 1
5                   | 5 \text{ million}
5 million           | 5 thousand
-2                  | 3–5
x2                  | x²
times and ratios
10:30               | 5:15
12:00               | 1:00
3:15 am             | 3:15 pm
3:15 am             | 15:15
2:3                 | 3:2
2:3                 | 2/3
2:3:4               | 2:3:5
words
left                | felt
x = left            | x = felt
east, west          | seat, west
turn left           | left turn
no                  | on
intervals and inequalities
(-\infty,3)         | x \le 3
x<3                 | (3,\infty)
(-\infty,1)\cup(2,\infty) | x<1 \text{ and } x>2
(-\infty,1)\cup(2,\infty) | x<1 \text{ or } x \ge 2
(1,2)               | x>1 \text{ and } y<2
roots and complex numbers
n                   | \sqrt{n^2}
\sqrt{x^4}          | -x^2
1                   | e^{i\pi}
2i                  | 2
choices
A                   | (B)\ 12
12                  | (A)\ 13
(A)\ 12             | (A)\ 13
(A)\ 12             | (B)\ 12
"""


def pairs(table: str) -> list[tuple[str, ...]]:
    rows = (line.split(" | ") for line in table.splitlines())
    return [tuple(part.strip() for part in row) for row in rows if len(row) == 2]


@pytest.mark.parametrize(("gold", "answer"), pairs(EQUAL))
def test_one_answer_in_two_forms_matches(gold: str, answer: str) -> None:
    assert compare(gold, answer).reason == "match"


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_another_answer_in_a_near_form_does_not(gold: str, answer: str) -> None:
    assert compare(gold, answer).reason == "mismatch"


@pytest.mark.parametrize("gold", ["102_2", "1.01_2", "0:x"])
def test_what_is_no_numeral_or_ratio_is_not_read_as_a_number(gold: str) -> None:
    assert compare(gold, gold).reason == "gold_unparseable"


@pytest.mark.parametrize(
    ("golds", "plain"),
    [
        (["44", "44.0", "44.", "$44$", "\\boxed{44}", "044", "+44", " \\(44\\) "], "44"),
        (["1234", "1,234", "1{,}234", "$1,234.00$"], "1234"),
        (["0.5", ".5", "0.50", "00.5"], "0.5"),
        (["-7", "-07", "-7.0"], "-7"),
        (["0", "-0", "0.0", "000"], "0"),
        (["\\frac{7}{4}", " $\\frac{7}{4}$ "], "\\frac{7}{4}"),
        (["$1$ or $2$"], "$1$ or $2$"),
        (["1,23"], "1,23"),
        (["$"], "$"),
        (["\\$5"], "\\$5"),
        (["\\{1, 2\\}"], "\\{1, 2\\}"),
    ],
)
def test_a_gold_is_scored_in_one_form(golds: list[str], plain: str) -> None:
    assert {plain_gold(gold) for gold in golds} == {plain}
