"""Ctrl-C and SIGTERM, as real signals to this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from trainer.parallel.signals import stop_on_signals
from trainer.parallel.world import ALONE

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def caught() -> Iterator[list[int]]:
    """Signals that reached the handlers of before the block; they would end the test run otherwise."""
    numbers: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        numbers.append(number)

    before = {number: signal.signal(number, note) for number in BOTH}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("first", "second"), [BOTH, BOTH[::-1]])
def test_the_second_signal_interrupts_at_once(
    first: signal.Signals, second: signal.Signals, caught: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signals(ALONE) as stop:
        assert stop() is None
        signal.raise_signal(first)
        assert stop() == first.name
        notice = capfd.readouterr().err
        assert notice.strip() == "finishing this step, then saving; press again to stop at once"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
        assert (stop(), capfd.readouterr().err) == (first.name, "")
    assert caught == []


def test_handlers_are_restored_after_the_block_and_after_an_error(caught: list[int]) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with stop_on_signals(ALONE):
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before
    with pytest.raises(ZeroDivisionError), stop_on_signals(ALONE):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in BOTH] == before
