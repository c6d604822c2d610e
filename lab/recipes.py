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
