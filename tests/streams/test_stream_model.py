"""A stream with several subscribers against a model that is plain lists."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from stream_tools import ALL, publish, subscribe

import memdesc as md
from memdesc.streams import Backpressure, Stream, Subscriber, Subscription, TakenSlot

SLOTS = 10


class Model:
    """One subscriber: what is offered to it, what it holds."""

    def __init__(self, policy: Backpressure, depth: int, loans: int) -> None:
        self.policy, self.depth, self.loans = policy, depth, loans
        self.offered: deque[int] = deque()
        self.held: list[TakenSlot] = []
        self.last = self.missed = 0
        self.dropped = False
        self.closed = False

    def offer(self, value: int) -> None:
        if self.closed or self.dropped:
            return
        if len(self.offered) == self.depth:
            if self.policy is Backpressure.DISCONNECT:
                self.dropped = True
                self.offered.clear()
                return
            if self.policy is Backpressure.DROP_NEWEST:
                return
            assert self.policy is Backpressure.DROP_OLDEST
            self.offered.popleft()
        self.offered.append(value)


class Machine(RuleBasedStateMachine):
    ends = Bundle("ends")

    @initialize()
    def begin(self) -> None:
        self.stream = Stream(nbytes=16, slots=SLOTS, policies=ALL)
        self.value = 0
        self.models: list[tuple[Model, Subscriber, Subscription]] = []

    def kept(self, extra: tuple[Backpressure, int, int] | None = None) -> int:
        """Slots that nobody can take back, as the documentation counts them."""
        kinds = [
            (model.policy, model.depth, model.loans)
            for model, _, _ in self.models
            if not (model.closed or model.dropped)
        ] + ([extra] if extra else [])
        alike = (Backpressure.BLOCK, Backpressure.DISCONNECT)
        return (
            sum(loans for _, _, loans in kinds)
            + sum(depth for policy, depth, _ in kinds if policy is Backpressure.DROP_NEWEST)
            + max([depth for policy, depth, _ in kinds if policy in alike], default=0)
            + sum(len(m.held) for m, _, _ in self.models if m.closed or m.dropped)
        )

    @rule(
        target=ends,
        policy=st.sampled_from(sorted(ALL, key=lambda one: one.value)),
        depth=st.integers(2, 3),
        loans=st.integers(1, 2),
        latest=st.booleans(),
    )
    def subscribe(self, policy: Backpressure, depth: int, loans: int, latest: bool) -> Any:
        options: dict[str, Any] = {"depth": depth, "loans": loans, "latest": latest}
        if self.kept((policy, depth, loans)) > SLOTS - 2:
            with pytest.raises(md.AllocationError):
                self.stream.admit(policy, **options)
            return None
        seat = self.stream.admit(policy, **options)
        model = Model(policy, depth, loans)
        if latest and self.value:
            model.offered.append(self.value)
        entry = model, seat, subscribe(self.stream, seat)
        self.models.append(entry)
        return entry

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            blocked = any(
                model.policy is Backpressure.BLOCK
                and not model.closed
                and len(model.offered) == model.depth
                for model, _, _ in self.models
            )
            if blocked:
                with pytest.raises(md.TimedOutError):
                    self.stream.loan(0)
                return
            self.value += 1
            publish(self.stream, self.value, timeout=0)
            for model, _, _ in self.models:
                model.offer(self.value)
            self.steal()

    def steal(self) -> None:
        """Where slots were short, the oldest offers went: seen by who has fewer than the model."""
        for model, _, subscription in self.models:
            if model.policy is Backpressure.DROP_OLDEST and not model.closed:
                while len(model.offered) > subscription.pending:
                    model.offered.popleft()

    @rule(entry=ends)
    def take(self, entry: Any) -> None:
        if entry is None or entry[0].closed:
            return
        model, _, subscription = entry
        if len(model.held) == model.loans:
            with pytest.raises(md.AllocationError):
                subscription.try_take()
            return
        if model.dropped:
            with pytest.raises(md.PeerGoneError):
                subscription.try_take()
            return
        slot = subscription.try_take()
        if not model.offered:
            assert slot is None
            return
        expected = model.offered.popleft()
        assert (slot.sequence, slot.metadata) == (expected, expected)
        if model.last:
            model.missed += expected - model.last - 1
        model.last = expected
        model.held.append(slot)

    @rule(entry=ends, which=st.integers(0, 1))
    def give_back(self, entry: Any, which: int) -> None:
        if entry is not None and len(entry[0].held) > which:
            entry[0].held.pop(which).release()

    @rule(entry=consumes(ends))
    def close(self, entry: Any) -> None:
        if entry is not None:
            entry[0].closed = True
            entry[0].offered.clear()
            entry[2].close()

    @rule()
    def loan_and_discard(self) -> None:
        try:
            self.stream.loan(0).discard()
        except md.TimedOutError:
            return
        self.steal()

    @invariant()
    def what_is_held_never_changes(self) -> None:
        for model, _, _ in getattr(self, "models", []):
            for slot in model.held:
                assert bytes(slot) == bytes([slot.metadata & 0xFF]) * 16

    @invariant()
    def the_books_agree(self) -> None:
        if not hasattr(self, "models"):
            return
        numbers = self.stream.statistics()
        held = {slot.sequence for model, _, _ in self.models for slot in model.held}
        offered = {value for model, _, _ in self.models for value in model.offered}
        latest = {self.value} - {0}
        assert numbers.free == SLOTS - len(held | offered | latest)
        for model, _, subscription in self.models:
            if not model.closed:
                assert subscription.missed == model.missed
                assert subscription.pending == len(model.offered)

    def teardown(self) -> None:
        if hasattr(self, "stream"):
            self.stream.close()
            for _, _, subscription in self.models:
                subscription.close()


Machine.TestCase.settings = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
test_stream_against_the_model = pytest.mark.slow(Machine.TestCase)
