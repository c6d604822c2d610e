"""Single pages of a Parquet file: where they lie, and what stands in one.

A part's rows are fetched by the hundred out of millions. A Parquet library reads whole row groups, and small
row groups make footers that weigh more than what is looked for. So the index knows the byte range of the page
in which each trace's text lies, and this file reads that page alone:

    file: | header  levels  values | header  levels  values | ... | footer |
            `------- a page ------'

Parquet's format (github.com/apache/parquet-format): data pages of version 2, headers in Thrift's compact
protocol, levels uncompressed before the values, values PLAIN or BYTE_STREAM_SPLIT and then zstd. Anything
else is no page of ours and a ValueError.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

PLAIN = 0
BYTE_STREAM_SPLIT = 9

_DATA_PAGE_V2 = 3
_ZSTD = pa.Codec("zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHeader:
    """What stands before a page's levels and values."""

    length: int
    """Bytes of the header itself."""
    body: int
    """Bytes of levels and values as they are stored."""
    plain_body: int
    """The same with the values uncompressed."""
    crc: int
    """CRC-32 of the stored body."""
    values: int
    """Levels in the page: for a list column one an element, and one an empty list."""
    empty: int
    """Levels without a value."""
    rows: int
    encoding: int
    definition_bytes: int
    repetition_bytes: int
    is_compressed: bool


def page_header(data: bytes | memoryview, start: int = 0) -> PageHeader:
    """The header at `start`. Raises ValueError when there is none, or one of another kind of page."""
    try:
        fields, end = _Compact(data, start).read()
        page = fields[8]
        if fields[1] != _DATA_PAGE_V2:
            raise ValueError(f"a page of type {fields[1]}, not a data page of version 2")
        return PageHeader(
            length=end - start,
            body=fields[3],
            plain_body=fields[2],
            crc=fields[4] & 0xFFFFFFFF,
            values=page[1],
            empty=page[2],
            rows=page[3],
            encoding=page[4],
            definition_bytes=page[5],
            repetition_bytes=page[6],
            is_compressed=page.get(7, True),
        )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("no page header where one should be") from error


def pages_of_chunk(data: bytes | memoryview, start: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(offset of the header, bytes with the header, rows) of each page of a column chunk."""
    place = start
    while place < start + size:
        header = page_header(data, place)
        yield place, header.length + header.body, header.rows
        place += header.length + header.body
    if place != start + size:
        raise ValueError("a page reaches over the end of its column")


def texts_of_page(page: bytes) -> list[bytes]:
    """The UTF-8 texts of a page of a required string column, [rows]. Raises ValueError when it is altered."""
    header, values = _values(page, PLAIN)
    texts, place = [], 0
    while place + 4 <= len(values):
        (length,) = struct.unpack_from("<I", values, place)
        texts.append(values[place + 4 : place + 4 + length])
        place += 4 + length
    if (place, len(texts)) != (len(values), header.rows):
        raise ValueError(f"a page whose content is not {header.rows} texts")
    return texts


def lists_of_page(page: bytes, dtype: str) -> list[np.ndarray[Any, Any]]:
    """The lists of a page of a required list column of 4-byte elements, [rows] arrays of `dtype`.

    Raises ValueError when the page is altered.
    """
    encoding = BYTE_STREAM_SPLIT if dtype == "<f4" else PLAIN
    header, values = _values(page, encoding)
    if encoding == BYTE_STREAM_SPLIT:
        streams = np.frombuffer(values, np.uint8).reshape(4, -1)
        flat = np.ascontiguousarray(streams.T).view(dtype).ravel()
    else:
        flat = np.frombuffer(values, dtype)
    levels = memoryview(page)[header.length :]
    try:
        starts_row = ~_bits(levels[: header.repetition_bytes], header.values)
        has_value = _bits(levels[header.repetition_bytes :][: header.definition_bytes], header.values)
    except IndexError as error:
        raise ValueError(f"a page without {header.values} levels") from error
    if (starts_row.sum(), has_value.sum()) != (header.rows, len(flat)):
        raise ValueError(f"a page whose content is not {header.rows} lists of {len(flat)} elements in all")
    row_of_value = (np.cumsum(starts_row) - 1)[has_value]
    lengths = np.bincount(row_of_value, minlength=header.rows)
    return np.split(flat, np.cumsum(lengths)[:-1])


def _values(page: bytes, encoding: int) -> tuple[PageHeader, bytes]:
    """The header, and the values' bytes uncompressed."""
    header = page_header(page)
    body = memoryview(page)[header.length :]
    if len(body) != header.body or zlib.crc32(body) != header.crc:
        raise ValueError("a page's checksum does not fit its content")
    if header.encoding != encoding:
        raise ValueError(f"a page in encoding {header.encoding}, not {encoding}")
    levels = header.definition_bytes + header.repetition_bytes
    values = body[levels:]
    if not header.is_compressed:
        return header, bytes(values)
    size = header.plain_body - levels
    if size < 0:
        raise ValueError(f"a page of {size} bytes")
    plain: bytes = _ZSTD.decompress(values, size, asbytes=True)
    return header, plain


def _bits(data: memoryview, count: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`count` levels of one bit each, out of Parquet's hybrid of run lengths and packed bits."""
    runs: list[np.ndarray[Any, Any]] = []
    place = found = 0
    while found < count:
        head, place = _varint(data, place)
        if head & 1:
            size = head >> 1  # groups of eight bits, a byte each
            runs.append(np.unpackbits(np.frombuffer(data[place : place + size], np.uint8), bitorder="little"))
            place += size
        else:
            runs.append(np.full(head >> 1, data[place] & 1, np.uint8))
            place += 1
        found += len(runs[-1])
    return np.concatenate(runs)[:count].astype(bool) if runs else np.empty(0, bool)


def _varint(data: bytes | memoryview, place: int) -> tuple[int, int]:
    """(value, place behind it)"""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, place


class _Compact:
    """A struct in Thrift's compact protocol, as field number -> value."""

    def __init__(self, data: bytes | memoryview, place: int) -> None:
        self._data = data
        self._place = place

    def read(self) -> tuple[dict[int, Any], int]:
        """(the struct, the place behind it)"""
        return self._struct(), self._place

    def _struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 0xF)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 8:
            length = self._unsigned()
            self._place += length
            return bytes(self._data[self._place - length : self._place])
        if kind == 12:
            return self._struct()
        raise ValueError(f"Thrift type {kind} in a page header")

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _unsigned(self) -> int:
        value, self._place = _varint(self._data, self._place)
        return value

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
