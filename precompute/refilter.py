"""Which filters a teacher's traces were judged by, and how to judge them anew without drawing anything."""

from __future__ import annotations

from typing import Any

from precompute.config import FiltersConfig
from store.errors import RecipeChangedError
from store.reading import read_teachers
from store.records import TeacherRecord
from store.writer import StoreWriter, recipe_changes


def filter_settings(filters: FiltersConfig) -> dict[str, Any]:
    """What a teacher's record says of the filters: every setting, or {} when none of them is on."""
    on = (filters.min_tokens, filters.max_tokens, filters.max_repetition, filters.scripts, filters.format)
    if not any(value not in (None, (), False) for value in on):
        return {}
    return filters.model_dump(mode="json")


def check_filters(writer: StoreWriter, record: TeacherRecord) -> None:
    """Raises RecipeChangedError when the store has traces of the teacher that other filters have judged: some
    would be held back by one measure and some by another."""
    known = read_teachers(writer.path).get(record.name)
    if known is None or dict(known.filters) == dict(record.filters) or not writer.done(record.name):
        return
    changes = "; ".join(recipe_changes(known.filters, record.filters, "filters."))
    raise RecipeChangedError(
        f"teacher {record.name!r} has traces in {writer.path} that other filters have judged: {changes}; "
        f"`ampo store refilter` settles them anew from their texts, and nothing is drawn again"
    )
