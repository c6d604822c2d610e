"""The README.md of an exported data set: teachers, verifier, recipes, columns."""

from __future__ import annotations

import json
from collections.abc import Sequence

from huggingface_hub import DatasetCardData

from store.export.export_forms import HF_COLUMNS, ExportOptions, ExportReport
from store.reader import TraceStore
from store.records import TeacherRecord
from store.reports.report import store_report

_LICENSE = """\
The traces are the output of the models below and the problems come from the sources in the column `source`:
look up the terms of both before you publish the data, and set `license` in the header of this file."""


def data_card(store: TraceStore, options: ExportOptions, exported: ExportReport) -> str:
    """Returns Markdown below the YAML header that the Hugging Face Hub and `datasets` read."""
    header = DatasetCardData(
        license="unknown", task_categories=["text-generation"], tags=["math", "reasoning", "ampo"]
    )
    records = store.teachers()
    kept = "every trace, wrong ones too" if options.everything else "verified traces alone"
    blocks = [
        f"---\n{header.to_yaml()}\n---",
        "# Teacher traces",
        f"{exported.rows:,} solutions of {exported.problems:,} problems by {len(exported.traces)} teachers: "
        f"{kept}. Every solution was verified by {store.manifest.verifier} "
        f"{store.manifest.verifier_version} against the gold answer.",
        "## Licence",
        _LICENSE,
        "## Teachers",
        _teachers(store, exported),
        "`verified` is the share of all traces of the teacher, including those left out here.",
        "## Recipes",
        *(_recipe(records[name]) for name in sorted(exported.traces) if name in records),
        "## Columns",
        _table(("column", "content"), *((f"`{each.name}`", each.doc) for each in HF_COLUMNS)),
    ]
    return "\n\n".join(blocks) + "\n"


def _table(*rows: Sequence[str]) -> str:
    """Returns a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _teachers(store: TraceStore, exported: ExportReport) -> str:
    rows = [
        (
            each.teacher,
            each.model or "unknown",
            f"{exported.traces[each.teacher]:,}",
            f"{each.traces:,}",
            f"{each.verified_share:.1%}",
        )
        for each in store_report(store).teachers
        if each.teacher in exported.traces
    ]
    return _table(("teacher", "model", "traces here", "traces written", "verified"), *rows)


def _recipe(record: TeacherRecord) -> str:
    recipe = {key: value for key, value in record.recipe.items() if key != "chat_template"}
    recipe["engine"] = f"{record.engine} {record.engine_version}"
    recipe["generation_fingerprint"] = record.generation_fingerprint
    return f"**{record.name}**\n\n```json\n{json.dumps(recipe, indent=2, ensure_ascii=False)}\n```"
