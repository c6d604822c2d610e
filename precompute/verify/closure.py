"""ANTLR's closure operation without its detours: the same configurations in the same order, twice as fast.

A closure follows the epsilon transitions of the grammar's network from one configuration (a state, and the
stack of rules that led to it). ANTLR's Python runtime walks them one by one and makes an object of each step;
here the way from a state to where something happens (a token, a rule that is called, the end of the rule) is
known beforehand. Closures that collect predicates or meet the end of the text are few, and left to ANTLR.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from antlr4.atn.ATNConfig import ATNConfig  # type: ignore[import-untyped]
from antlr4.atn.ATNState import ATNState, RuleStopState  # type: ignore[import-untyped]
from antlr4.atn.ParserATNSimulator import ParserATNSimulator  # type: ignore[import-untyped]
from antlr4.atn.Transition import Transition  # type: ignore[import-untyped]
from antlr4.PredictionContext import (  # type: ignore[import-untyped]
    PredictionContext,
    SingletonPredictionContext,
)

_SILENT = frozenset((Transition.EPSILON, Transition.ACTION, Transition.PREDICATE, Transition.PRECEDENCE))
"""Transitions that take no token; of predicates these closures collect none."""


class _Kind(Enum):
    TOKEN = 0
    CALL = 1
    STOP = 2
    LOOP = 3


_TOKEN, _CALL, _STOP, _LOOP = _Kind


class _Step(NamedTuple):
    """Where the silent transitions from a state lead."""

    kind: _Kind
    state: Any
    """The state that takes a token, that begins the called rule, that ends this one, or that may enter a
    loop of a left-recursive rule."""
    follow: int
    """Of a called rule: where it returns to."""


class QuickSimulator(ParserATNSimulator):  # type: ignore[misc]
    """ANTLR's prediction with a quick closure."""

    def closure(
        self,
        config: Any,
        configs: Any,
        busy: set[Any],
        collect: bool,
        full: bool,
        to_end: bool,
    ) -> None:
        """Adds to `configs` what can be reached from `config` without a token.

        `busy`: what was reached before; `collect`: with the predicates; `full`: the stack of rules is known
        to its end; `to_end`: the text ends here.
        """
        if collect or to_end:
            super().closure(config, configs, busy, collect, full, to_end)
            return
        walk = _Walk(self, config, configs, busy, full)
        walk.spread(
            config.state, config.context, config.reachesIntoOuterContext, config.precedenceFilterSuppressed
        )


class _Walk:
    """The closure of one configuration. `outer` counts the rules that were left without a caller known,
    `suppressed` is ANTLR's precedenceFilterSuppressed."""

    __slots__ = ("alt", "busy", "configs", "full", "semantic", "simulator")

    def __init__(self, simulator: Any, config: Any, configs: Any, busy: set[Any], full: bool) -> None:
        self.simulator = simulator
        self.alt = config.alt
        self.semantic = config.semanticContext
        self.configs = configs
        self.busy = busy
        self.full = full

    def spread(self, state: Any, context: Any, outer: int, suppressed: bool) -> None:
        for kind, target, follow in _steps(state):
            if kind is _TOKEN:
                self.add(target, context, outer, suppressed)
            elif kind is _CALL:
                self.spread(target, SingletonPredictionContext(context, follow), outer, suppressed)
            elif kind is _STOP:
                self.leave(target, context, outer, suppressed)
            else:
                self.loop(target, context, outer, suppressed)

    def add(self, state: Any, context: Any, outer: int, suppressed: bool) -> None:
        config = ATNConfig(state, self.alt, context, self.semantic)
        config.reachesIntoOuterContext = outer
        config.precedenceFilterSuppressed = suppressed
        self.configs.add(config, self.simulator.mergeCache)

    def loop(self, state: Any, context: Any, outer: int, suppressed: bool) -> None:
        here = ATNConfig(state, self.alt, context, self.semantic)
        enters = not self.simulator.canDropLoopEntryEdgeInLeftRecursiveRule(here)
        for transition in state.transitions if enters else state.transitions[1:]:
            self.spread(transition.target, context, outer, suppressed)

    def leave(self, stop: Any, context: Any, outer: int, suppressed: bool) -> None:
        if context.isEmpty():
            self.leave_for_anywhere(stop, context, outer, suppressed)
            return
        for i in range(len(context)):
            back = context.getReturnState(i)
            if back == PredictionContext.EMPTY_RETURN_STATE:
                there = PredictionContext.EMPTY if self.full else context
                self.leave_for_anywhere(stop, there, outer, suppressed)
            else:
                self.spread(self.simulator.atn.states[back], context.getParent(i), outer, False)

    def leave_for_anywhere(self, stop: Any, context: Any, outer: int, suppressed: bool) -> None:
        """No caller is known: with the full context this is the end, without it may be any that there is."""
        if self.full or not stop.epsilonOnlyTransitions:
            self.add(stop, context, outer, suppressed)
        for transition in () if self.full else stop.transitions:
            hidden = suppressed or self._is_outermost(transition)
            key = transition.target.stateNumber, self.alt, context, self.semantic, hidden
            if key not in self.busy:
                self.busy.add(key)
                self.configs.dipsIntoOuterContext = True
                self.spread(transition.target, context, outer + 1, hidden)

    def _is_outermost(self, transition: Any) -> bool:
        dfa = self.simulator._dfa
        return bool(
            dfa is not None
            and dfa.precedenceDfa
            and transition.outermostPrecedenceReturn == dfa.atnStartState.ruleIndex
        )


_KNOWN: dict[int, tuple[_Step, ...]] = {}
"""The steps from each state, by its number: there is one network, the grammar's."""


def _steps(state: Any) -> tuple[_Step, ...]:
    steps = _KNOWN.get(state.stateNumber)
    if steps is None:
        steps = _KNOWN[state.stateNumber] = tuple(_found(state))
    return steps


def _found(state: Any) -> Iterator[_Step]:
    if isinstance(state, RuleStopState):
        yield _Step(_STOP, state, 0)
        return
    if state.stateType == ATNState.STAR_LOOP_ENTRY and state.isPrecedenceDecision:
        yield _Step(_LOOP, state, 0)
        return
    if not state.epsilonOnlyTransitions:
        yield _Step(_TOKEN, state, 0)
    for transition in state.transitions:
        if transition.serializationType == Transition.RULE:
            yield _Step(_CALL, transition.target, transition.followState.stateNumber)
        elif transition.serializationType in _SILENT:
            yield from _found(transition.target)
