"""Micro-batches: every sequence once, no budget exceeded, values where they belong."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trainer.student.batches import fill, split_over_ranks


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_every_sequence_is_in_one_micro_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = fill(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


def test_filling_sorts_by_length_so_that_little_is_padded() -> None:
    # Longest first: 9; 8 does not fit beside it (2 * 9 > 16), so three passes are the fewest. 9 + 8 + 2 * 2
    # are 21 tokens with padding, 9 + 2 * 8 + 1 would be 26.
    assert fill([1, 9, 2, 8], 16) == [[1], [3], [2, 0]]


def test_a_long_sequence_does_not_pad_many_short_ones_and_few_are_worth_no_pass_of_their_own() -> None:
    # Together 9 * 400 = 3,600 tokens in one pass; apart 400 + 8 * 40 = 720 and a pass more, worth 1,024.
    assert fill([40] * 4 + [400] + [40] * 4, 16384) == [[4], [0, 1, 2, 3, 5, 6, 7, 8]]
    # Together 2 * 400 = 800; apart 440 + 1,024.
    assert fill([40, 400], 16384) == [[1, 0]]


def test_each_rank_gets_as_many_long_sequences() -> None:
    # Longest first: 9 (index 1), 8 (3), 5 (4), 2 (2), 1 (0), one rank after the other, in ascending order.
    assert split_over_ranks([1, 9, 2, 8, 5], 2) == [[0, 1, 4], [2, 3]]
    assert split_over_ranks([7, 7], 3) == [[0], [1], []]
    assert split_over_ranks([1, 9, 2], 1) == [[0, 1, 2]]
