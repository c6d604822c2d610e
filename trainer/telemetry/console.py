"""The terminal's view of a training run: a line a step, sample completions, evaluations."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from store.terminal.progress import progress_bars
from store.terminal.tables import plain_table
from trainer.config import RunConfig
from trainer.evaluation import Evaluation
from trainer.method.groups import Group, Sample
from trainer.parallel.world import World
from trainer.reports.tables import estimate_text

logger = logging.getLogger("ampo")

LARGE_CUT_SHARE = 0.25
"""Share of truncated samples above which a warning is printed."""

WIDE = 120
"""Columns of a terminal from which a step is one line with names; narrower ones print names as a heading."""

LONGEST_CELL = 220
"""Characters of a response in a table; rollouts/ has all of it."""


class TrainReporter:
    """Base of all reporters: prints nothing and keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def started(self, *, run: Path, begins: str, after_step: int, max_steps: int) -> None:
        """Called once, before the first step. `begins`: from where the run goes on, in words."""

    def sft_stepped(self, row: dict[str, Any], steps: int) -> None:
        """Called after each supervised step with its metrics."""

    def stepped(self, row: dict[str, Any], groups: list[Group]) -> None:
        """Called after each sampling step with its metrics and its groups."""

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Called after each evaluation."""

    def sampling(self, label: str, done: int, total: int) -> None:
        """Called after each sample."""

    def saved(self, path: Path) -> None:
        """Called after each checkpoint."""

    def warned(self, text: str) -> None:
        """Called with everything that a person should know."""
        self.warnings.append(text)


class ConsoleReporter(TrainReporter):
    """Prints to a rich console; a progress bar where there is a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, config: RunConfig) -> None:
        super().__init__()
        self.console = console
        self.config = config
        self.max_steps = 0
        self._progress = progress_bars(console)
        self._sampling: TaskID | None = None
        self._sft: TaskID | None = None
        self._under_heads = False

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, *, run: Path, begins: str, after_step: int, max_steps: int) -> None:
        """Prints the run's directory and the step that it resumes after."""
        self.max_steps = max_steps
        self._task = self._progress.add_task("training", total=max_steps, completed=after_step, note="")
        self._print(f"run {run}: {begins}, to step {max_steps}")

    def sft_stepped(self, row: dict[str, Any], steps: int) -> None:
        """Prints the line of an SFT step."""
        if self._sft is None:
            self._sft = self._progress.add_task("SFT", total=steps, note="")
        self._progress.update(self._sft, completed=row["sft/step"], visible=row["sft/step"] < steps, note="")
        self._print(
            f"SFT {row['sft/step']:>{len(str(steps))}}/{steps}  loss {row['sft/loss']:6.3f}  "
            f"{row['sft/traces']} traces, {row['sft/tokens']} tokens  {row['seconds/sft']:.1f} s"
        )

    def stepped(self, row: dict[str, Any], groups: list[Group]) -> None:
        """Prints the line of a step, and every n steps a table of sample completions."""
        self._progress.update(self._task, completed=row["step"], note=f"solved {row['accuracy']:.0%}")
        self._print_step(row)
        cut = row["completions/clipped_ratio"]
        if cut > LARGE_CUT_SHARE:
            self.warned(
                f"{cut:.0%} of the samples reached rollout.max_completion_length; none of them can be right"
            )
        every = self.config.log_completions_every
        if every and row["step"] % every == 0:
            self._under_heads = False
            self.console.print(completions_table(row["step"], groups, self.config.num_completions_to_print))

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Prints pass@k in one line."""
        score = evaluation.overall
        passes = "  ".join(f"pass@{k} {estimate_text(found)}" for k, found in score.pass_at.items())
        self._print(
            f"eval step {step}: {passes}  length {score.mean_length:.0f} "
            f"({score.problems} problems x {evaluation.n} samples)",
            soft_wrap=False,
        )

    def sampling(self, label: str, done: int, total: int) -> None:
        """Updates a bar below the run's; without a terminal nothing is printed."""
        if self._sampling is None:
            self._sampling = self._progress.add_task(label, total=total, note="")
        self._progress.update(
            self._sampling,
            description=label,
            completed=done,
            total=total,
            note="samples",
            visible=done < total,
        )

    def saved(self, path: Path) -> None:
        """Prints the checkpoint's directory."""
        self._print(f"saved {path}")

    def warned(self, text: str) -> None:
        """Prints a warning."""
        logger.warning(text)
        self._under_heads = False
        self.console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def _print(self, text: str, *, soft_wrap: bool = True) -> None:
        logger.info(text)
        self._under_heads = False
        self.console.print(escape(text), highlight=False, soft_wrap=soft_wrap)

    def _print_step(self, row: dict[str, Any]) -> None:
        line = step_line(row, self.max_steps)
        if self.console.width >= WIDE:
            self._print(line)
            return
        logger.info(line)
        if not self._under_heads:
            self.console.print(STEP_HEADS, style="dim", highlight=False)
            self._under_heads = True
        self.console.print(step_cells(row), highlight=False)


def reporter_of(world: World, console: Console, config: RunConfig) -> AbstractContextManager[TrainReporter]:
    """The reporter of this rank: only rank 0 prints."""
    return ConsoleReporter(console, config) if world.is_main else nullcontext(TrainReporter())


def step_line(row: dict[str, Any], max_steps: int) -> str:
    """Returns a step as one line; `-` for missing values."""
    hit = row["store/hit_rate"]
    queried = f"queried {row['store/queries']:.0f}" + ("" if hit is None else f" ({hit:.0%} hit)")
    return (
        f"step {row['step']:>{len(str(max_steps))}}/{max_steps}  reward {row['reward']:.3f}  "
        f"solved {row['accuracy']:4.0%}  all-fail {row['groups/all_fail']:4.0%}  {queried:<20} "
        f"loss {_number(row['loss'])}  entropy {_number(row['entropy'])}  "
        f"len {row['completions/mean_length']:.0f}  {row['seconds/step']:.1f} s"
    )


STEP_HEADS = " step  reward  solved  all-fail  queried   hit    loss  entropy    len    time"


def step_cells(row: dict[str, Any]) -> str:
    """Returns the numbers of `step_line`, each below its name in STEP_HEADS."""
    hit = row["store/hit_rate"]
    return (
        f"{row['step']:5}  {row['reward']:6.3f}  {row['accuracy']:6.0%}  {row['groups/all_fail']:8.0%}  "
        f"{row['store/queries']:7.0f}  {'-' if hit is None else f'{hit:.0%}':>4}  {_number(row['loss'])}  "
        f" {_number(row['entropy'])}  {row['completions/mean_length']:5.0f}  {row['seconds/step']:4.1f} s"
    )


def _number(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.3f}"


def completions_table(step: int, groups: list[Group], problems: int) -> Table:
    """Returns a sample of each of the first `problems` problems, and a trace where one replaced it."""
    table = plain_table(f"sample completions, step {step}")
    for name in ("problem", "by", "response", "correct", "reward"):
        table.add_column(name, overflow="fold")
    for group in groups[:problems]:
        _add_row(table, group, group.samples[0], "student")
        for trace in list(group.guidance.values())[:1]:
            _add_row(table, group, trace, f"teacher {trace.teacher}")
    return table


def _add_row(table: Table, group: Group, sample: Sample, who: str) -> None:
    question, half = " ".join(group.prompt.problem.question.split()), LONGEST_CELL // 2 - 1
    text = " ".join(sample.text.split())
    # Its beginning and its end matter most.
    shown = text if len(text) <= LONGEST_CELL else f"{text[:half]} … {text[-half:]}"
    table.add_row(
        escape(question if len(question) <= LONGEST_CELL else question[: LONGEST_CELL - 1] + "…"),
        who,
        escape(shown),
        "[green]yes[/]" if sample.is_correct else "[red]no[/]",
        f"{sample.reward:.2f}",
    )
