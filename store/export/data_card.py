"""The README.md of an exported data set: teachers, verifier, recipes, columns."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from huggingface_hub import DatasetCardData

from store.export.export_forms import HF_COLUMNS
from store.reader import TraceStore
from store.records import TeacherRecord
from store.reports.report import store_report

if TYPE_CHECKING:
    from store.export.exporting import ExportOptions, ExportReport

_NO_LICENSE = """\
The licence of this data set was not given at its export. The traces are the output of the models below and
the problems come from the sources in the column `source`: look up the terms of both before you publish the
data, and set `license` in the header of this file."""


def data_card(store: TraceStore, options: ExportOptions, exported: ExportReport) -> str:
    """Returns Markdown below the YAML header that the Hugging Face Hub and `datasets` read."""
    header = DatasetCardData(
        license=options.license, task_categories=["text-generation"], tags=["math", "reasoning", "ampo"]
    )
    records = store.teachers()
    teachers = sorted(exported.traces)
    kept = "every trace, wrong ones too" if options.everything else "verified traces alone"
    blocks = [
        f"---\n{header.to_yaml()}\n---",
        "# Teacher traces",
        f"{exported.rows:,} solutions of {exported.problems:,} problems by {len(teachers)} "
        f"{'teacher' if len(teachers) == 1 else 'teachers'}: {kept}. Every solution was verified by "
        f"{store.manifest.verifier} {store.manifest.verifier_version} against the gold answer.",
        "## Licence",
        _NO_LICENSE if options.license == "unknown" else options.license,
        "## Teachers",
        _teachers(store, exported),
        "`verified` is the share of all traces of the teacher, including those left out here.",
        "## Recipes",
        *(_recipe(name, records.get(name)) for name in teachers),
        "## Columns",
        "\n".join(
            [
                "| column | content |",
                "| --- | --- |",
                *(f"| `{each.name}` | {each.doc} |" for each in HF_COLUMNS),
            ]
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def _teachers(store: TraceStore, exported: ExportReport) -> str:
    lines = [
        "| teacher | model | traces here | traces written | verified |",
        "| --- | --- | --- | --- | --- |",
    ]
    for report in store_report(store).teachers:
        if report.teacher in exported.traces:
            lines.append(
                f"| {report.teacher} | {report.model or 'unknown'} | {exported.traces[report.teacher]:,} "
                f"| {report.traces:,} | {report.verified_share:.1%} |"
            )
    return "\n".join(lines)


def _recipe(name: str, record: TeacherRecord | None) -> str:
    if record is None:
        return f"- **{name}**: its record is lost"
    recipe = {key: value for key, value in record.recipe.items() if key != "chat_template"}
    recipe["engine"] = f"{record.engine} {record.engine_version}"
    recipe["generation_fingerprint"] = record.generation_fingerprint
    return f"**{name}**\n\n```json\n{json.dumps(recipe, indent=2, ensure_ascii=False)}\n```"
