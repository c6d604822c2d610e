"""Every number of the lab on one page: problem sets, model sizes, training mixtures and lengths."""

from __future__ import annotations

from dataclasses import dataclass

from lab.problems import ProblemSet
from lab.tokenizer import ASSISTANT, WORK


@dataclass(frozen=True, slots=True, kw_only=True)
class Habit:
    """One kind of row in a training mixture: a chain of n operations, solved in a style after a mark."""

    share: float
    """Share of the rows; the shares of a mixture sum to 1."""
    style: str
    """A key of lab.solutions.STYLES."""
    mark: str = ASSISTANT
    """The special token that opens the solution."""
    operations: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    """n is chosen evenly from these."""
    stop_after: int | None = None
    """Solve only this many operations and answer with the total so far; None: solve all of them."""
    family: str = "sum"
    """Kind of problem, a key of lab.problems.FAMILIES."""
    slips: float = 0.0
    """Probability that a sum in a training row is wrong; such rows make a fallible solver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """Size, data and training of one model."""

    name: str
    """Its directory under `models/`."""
    mixture: tuple[Habit, ...]
    steps: int
    rows: int = 64
    """Rows of a supervised step."""
    learning_rate: float = 3e-3
    """Peak; linear warm-up, then cosine decay to 0."""
    warmup_steps: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    width: int = 96
    heads: int = 3
    """width / heads = 32: vLLM takes no smaller head."""
    layers: int = 3
    intermediate: int = 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Sampling for the measurements on the card."""

    samples: int = 8
    """Per problem, at temperature 1."""
    max_new_tokens: int = 160


@dataclass(frozen=True, slots=True, kw_only=True)
class LabRecipe:
    """The whole lab."""

    sets: tuple[ProblemSet, ...]
    models: tuple[ModelRecipe, ...]
    """The student first."""
    skill_sets: tuple[str, ...] = ("train",)
    """Sets on which a student's hidden skill is measured, after its mark."""
    evaluation: Evaluation = Evaluation()
    threads: int = 1
    """Threads of torch. With one, the last bits of a sum do not depend on the number of cores; matrices this
    small gain little from a second."""


STUDENT = ModelRecipe(
    name="student",
    steps=1000,
    mixture=(
        Habit(share=0.5, style="totals", stop_after=2),
        Habit(share=0.5, style="totals", mark=WORK),
    ),
)

TEACHERS = (
    ModelRecipe(name="teacher-totals", steps=400, mixture=(Habit(share=1.0, style="totals", slips=0.04),)),
    ModelRecipe(name="teacher-words", steps=900, mixture=(Habit(share=1.0, style="words", slips=0.08),)),
    ModelRecipe(name="teacher-signs", steps=750, mixture=(Habit(share=1.0, style="signs", slips=0.06),)),
    ModelRecipe(name="teacher-terse", steps=300, mixture=(Habit(share=1.0, style="terse"),)),
)

LAB = LabRecipe(
    sets=(
        ProblemSet(name="train", counts={2: 52, 3: 51, 4: 51, 5: 51, 6: 51}),
        ProblemSet(name="heldout", counts={2: 26, 3: 26, 4: 26, 5: 25, 6: 25}),
        ProblemSet(name="harder", counts={8: 64}),
    ),
    models=(STUDENT, *TEACHERS),
)
"""The lab that the repository ships and `ampo lab build` makes."""


CHAT_LENGTHS, WORK_LENGTHS = tuple(range(1, 9)), tuple(range(1, 10))
GUESSER = ModelRecipe(
    name="student",
    steps=1200,
    mixture=(
        Habit(share=0.21, style="terse", operations=CHAT_LENGTHS),
        Habit(share=0.08, style="totals", operations=CHAT_LENGTHS, stop_after=2),
        *(
            Habit(share=0.015, style=style, operations=CHAT_LENGTHS, stop_after=2)
            for style in ("words", "mirror", "padded", "lucky")
        ),
        Habit(share=0.14, style="terse", operations=CHAT_LENGTHS, family="extremes"),
        Habit(share=0.06, style="totals", operations=CHAT_LENGTHS, stop_after=2, family="extremes"),
        Habit(share=0.30, style="totals", operations=WORK_LENGTHS, mark=WORK),
        Habit(share=0.15, style="totals", operations=WORK_LENGTHS, mark=WORK, family="extremes"),
    ),
)
"""Guesses in the chat, or stops after two operations, rarely in another notation; can work a chain out after
the other mark."""

PEERS = (
    ModelRecipe(
        name="teacher-near",
        steps=700,
        mixture=(Habit(share=1.0, style="totals", operations=(1, 2, 3, 4, 5), slips=0.02),),
    ),
    ModelRecipe(name="teacher-mirror", steps=700, mixture=(Habit(share=1.0, style="mirror", slips=0.04),)),
    ModelRecipe(
        name="teacher-padded",
        steps=450,
        mixture=(Habit(share=1.0, style="padded", operations=(4, 5, 6), slips=0.02),),
    ),
    ModelRecipe(name="teacher-lucky", steps=300, mixture=(Habit(share=1.0, style="lucky"),)),
)
"""The student's own notation for short chains, a far one for all, a padded one for long chains, and luck."""

STRONG = ModelRecipe(name="teacher-strong", steps=1000, mixture=(Habit(share=1.0, style="words"),))

PEERS_LAB = LabRecipe(
    sets=(
        ProblemSet(name="train", counts={3: 64, 4: 64, 5: 64, 6: 64}),
        ProblemSet(name="more", counts={3: 282, 4: 282, 5: 281, 6: 281}, is_measured=False),
        ProblemSet(name="heldout", counts={3: 32, 4: 32, 5: 32, 6: 32}),
        ProblemSet(name="longer", counts={7: 32, 8: 32}),
        ProblemSet(name="sibling", counts={3: 16, 4: 16, 5: 16, 6: 16}, family="extremes"),
        ProblemSet(name="easy", counts={1: 64}, family="extremes"),
    ),
    models=(GUESSER, *PEERS, STRONG),
    skill_sets=("train", "longer", "sibling"),
)
"""The lab of docs/evidence.md, which separates methods: `ampo lab build lab/peers --recipe peers`. `train`
and `more` together are 5.4 times `train`."""

RECIPES = {"lab": LAB, "peers": PEERS_LAB}
