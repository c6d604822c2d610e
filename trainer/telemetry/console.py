"""The terminal's view of a training run: a line a step, sample completions, evaluations."""

from __future__ import annotations

import logging
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import TaskID
from rich.table import Table

from store.terminal.progress import progress_bars
from store.terminal.tables import clipped, plain_table
from trainer.config import RunConfig
from trainer.evaluation import Evaluation
from trainer.method.groups import Group

logger = logging.getLogger("ampo")

LARGE_CUT_SHARE = 0.25
"""Share of truncated samples above which a warning is printed."""
LONGEST_CELL = 220
"""Characters of a text in a table; rollouts/ has all of it."""


class TrainReporter:
    """Prints to a rich console: bars and lines on a terminal, lines elsewhere, and the lines to log.txt.

    A context manager. Without a console it prints nothing, and keeps the warnings.
    """

    def __init__(self, console: Console | None = None, config: RunConfig | None = None) -> None:
        self.console = console or Console(quiet=True, force_terminal=False)
        self.config = config or RunConfig()
        self.warnings: list[str] = []
        self._progress = progress_bars(self.console)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def line(self, text: str) -> None:
        """Prints the line as it is."""
        logger.info(text)
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def warned(self, text: str) -> None:
        """Prints a warning, which a person should know."""
        self.warnings.append(text)
        logger.warning(text)
        self.console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False, soft_wrap=True)

    def progress(
        self, label: str, done: int, total: int, *, bar: str = "samples", note: str = "samples"
    ) -> None:
        """Moves a bar, which is hidden at its end. Bars of one name replace each other."""
        if bar not in self._bars:
            self._bars[bar] = self._progress.add_task(label, total=total, completed=done, note=note)
        self._progress.update(
            self._bars[bar], description=label, completed=done, total=total, note=note, visible=done < total
        )

    def sft_stepped(self, row: dict[str, Any], steps: int) -> None:
        """Prints the line of an SFT step."""
        self.progress("SFT", row["sft/step"], steps, bar="run", note="")
        self.line(
            f"SFT {row['sft/step']:>{len(str(steps))}}/{steps}  loss {row['sft/loss']:6.3f}  "
            f"{row['sft/traces']} traces, {row['sft/tokens']} tokens  {row['seconds/sft']:.1f} s"
        )

    def stepped(self, row: dict[str, Any], groups: list[Group], steps: int) -> None:
        """Prints the line of a step, `-` for missing values, and every n steps a table of samples."""
        solved = f"solved {row['accuracy']:.0%}"
        self.progress("training", row["step"], steps, bar="run", note=solved)
        hit = row["store/hit_rate"]
        queried = f"queried {row['store/queries']:.0f}" + ("" if hit is None else f" ({hit:.0%} hit)")
        loss, entropy = ("     -" if row[key] is None else f"{row[key]:6.3f}" for key in ("loss", "entropy"))
        self.line(
            f"step {row['step']:>{len(str(steps))}}/{steps}  reward {row['reward']:.3f}  "
            f"solved {row['accuracy']:4.0%}  all-fail {row['groups/all_fail']:4.0%}  {queried:<20} "
            f"loss {loss}  entropy {entropy}  "
            f"len {row['completions/mean_length']:.0f}  {row['seconds/step']:.1f} s"
        )
        cut = row["completions/clipped_ratio"]
        if cut > LARGE_CUT_SHARE:
            self.warned(
                f"{cut:.0%} of the samples reached rollout.max_completion_length; none of them can be right"
            )
        every = self.config.log_completions_every
        if every and row["step"] % every == 0:
            self.console.print(completions_table(row["step"], groups, self.config.num_completions_to_print))

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Prints pass@k in one line."""
        score = evaluation.overall
        passes = "  ".join(f"pass@{k} {found.text()}" for k, found in score.pass_at.items())
        of_set = f" {evaluation.name}" if evaluation.name else ""
        self.line(
            f"eval{of_set} step {step}: {passes}  length {score.mean_length:.0f} "
            f"({score.problems} problems x {evaluation.n} samples)"
        )


def completions_table(step: int, groups: list[Group], problems: int) -> Table:
    """Returns a sample of each of the first `problems` problems, and a trace where one replaced it."""
    table = plain_table(f"sample completions, step {step}")
    for name in ("problem", "by", "response", "correct", "reward"):
        table.add_column(name, overflow="fold")
    for group in groups[:problems]:
        for sample in (group.samples[0], *group.traces[:1]):
            text = " ".join(sample.text.split())
            if len(text) > LONGEST_CELL:  # its beginning and its end matter most
                text = f"{text[: LONGEST_CELL // 2]} … {text[-LONGEST_CELL // 2 :]}"
            table.add_row(
                escape(clipped(group.prompt.problem.question, LONGEST_CELL)),
                f"teacher {sample.teacher}" if sample.is_teacher else "student",
                escape(text),
                "[green]yes[/]" if sample.is_correct else "[red]no[/]",
                f"{sample.reward:.2f}",
            )
    return table
