"""Single pages, read without a Parquet library: the same values as the library gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.format.pages import lists_of_page, page_header, pages_of_chunk, texts_of_page
from store.format.schema import PART_OPTIONS, TRACE_SCHEMA

FIELDS = [TRACE_SCHEMA.field(name) for name in ("text", "token_ids", "logprobs")]

rows_of_a_part = st.lists(
    st.tuples(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40),
        st.lists(st.integers(0, 2**31 - 1), max_size=20),
        st.lists(st.floats(width=32, allow_nan=False), max_size=20),
    ),
    min_size=1,
    max_size=40,
)


def part_of(rows: list[tuple[str, list[int], list[float]]], path: Path) -> list[list[bytes]]:
    """The pages of a part with these rows: of its texts, its ids, its log-probabilities."""
    columns = [
        pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), FIELDS, strict=True)
    ]
    options = PART_OPTIONS | {"write_statistics": False}
    pq.write_table(pa.table(columns, pa.schema(FIELDS)), path, **options)
    data = path.read_bytes()
    group = pq.ParquetFile(path).metadata.row_group(0)
    return [
        [
            data[at : at + size]
            for at, size, _ in pages_of_chunk(data, c.data_page_offset, c.total_compressed_size)
        ]
        for c in map(group.column, range(3))
    ]


@settings(max_examples=60, deadline=None)
@given(rows=rows_of_a_part)
def test_pages_give_back_what_was_written(
    rows: list[tuple[str, list[int], list[float]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts, ids, logprobs = part_of(rows, tmp_path_factory.getbasetemp() / "pages.parquet")
    assert [text.decode() for page in texts for text in texts_of_page(page)] == [row[0] for row in rows]
    assert [each.tolist() for page in ids for each in lists_of_page(page, "<i4")] == [row[1] for row in rows]
    found = [each for page in logprobs for each in lists_of_page(page, "<f4")]
    for each, row in zip(found, rows, strict=True):
        np.testing.assert_array_equal(each, np.array(row[2], np.float32))


def test_a_page_holds_eight_rows(tmp_path: Path) -> None:
    texts, ids, _ = part_of([(f"text {i}", [i] * (i % 3), []) for i in range(20)], tmp_path / "part")
    assert [page_header(page).rows for page in texts] == [8, 8, 4]
    assert [page_header(page).rows for page in ids] == [8, 8, 4]


@pytest.mark.parametrize("place", [-1, -20, 40])
def test_a_flipped_bit_is_seen(place: int, tmp_path: Path) -> None:
    texts, _, _ = part_of([(f"some text {i} " * 9, [], []) for i in range(8)], tmp_path / "part")
    page = bytearray(texts[0])
    page[place] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        texts_of_page(bytes(page))


def test_what_is_no_page_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no page header"):
        page_header(b"\x00\x00")
    texts, _, logprobs = part_of([("a", [1], [0.5])], tmp_path / "part")
    with pytest.raises(ValueError, match="encoding 9, not 0"):
        lists_of_page(logprobs[0], "<i4")
    with pytest.raises(ValueError, match="checksum"):
        texts_of_page(texts[0][:-1])
