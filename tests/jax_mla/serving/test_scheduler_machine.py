"""The scheduler under random events: nothing leaks, starves, or sees another request's tokens."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from serving_machine import VOCAB, Machine, continuation

from jax_mla.serving.request import Request, RequestOptions
from jax_mla.serving.scheduler import Scheduler

SIZES = st.fixed_dictionaries(
    {
        "num_pages": st.integers(3, 24),
        "page_size": st.sampled_from([1, 2, 4]),
        "max_batch": st.integers(1, 5),
        "max_tokens": st.just(40),
    }
)


class Requests(RuleBasedStateMachine):
    """Submits, forks, steps, reads back, aborts and overdue requests in any order."""

    deterministic = False
    num_events = 0  # of all instances of a class

    @initialize(sizes=SIZES, chunk_pages=st.integers(1, 4))
    def start(self, sizes, chunk_pages):
        chunk_tokens = chunk_pages * sizes["page_size"]
        self.machine = Machine(
            Scheduler(**sizes, chunk_tokens=chunk_tokens, deterministic=self.deterministic)
        )
        self.requests, self.now = [], 0

    @property
    def alive(self) -> list[Request]:
        return [r for r in self.requests if r.finish_reason is None]

    @rule(
        # Few different beginnings, so that prompts share pages whole and in part.
        beginning=st.integers(0, 2),
        length=st.integers(1, 30),
        end=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        max_new_tokens=st.integers(1, 9),
        stop_ids=st.sampled_from([(), (0,), (1, 2)]),
        priority=st.sampled_from([0, 0, 0, 1]),
        salt=st.sampled_from(["", "", "a"]),
        num_forks=st.sampled_from([0, 0, 1, 3]),
        patience=st.sampled_from([None, None, None, 5]),
    )
    def submit(
        self, beginning, length, end, max_new_tokens, stop_ids, priority, salt, num_forks, patience
    ):
        prompt = [(beginning * i) % VOCAB for i in range(length)] + end
        parent = None
        for seed in range(1 + num_forks):
            request = Request(
                prompt,
                max_new_tokens=max_new_tokens,
                options=RequestOptions(seed=seed, priority=priority, cache_salt=salt),
                stop_ids=stop_ids,
                fork_of=parent,
                deadline=None if patience is None else self.now + patience,
            )
            pool = self.machine.scheduler.pool
            before = list(pool.references), pool.num_free
            try:
                self.machine.scheduler.submit(request)
            except ValueError:
                assert (list(pool.references), pool.num_free) == before
                needed = -(-request.max_tokens // self.machine.scheduler.page_size)
                assert needed > len(pool.references) or request.max_tokens > 40
                return
            self.requests.append(request)
            parent = parent or request

    @rule()
    def step(self):
        before = {r: len(r.tokens) + r.num_cached for r in self.alive}
        oldest = min(self.alive, key=lambda r: r.order, default=None)
        held = oldest is not None and oldest.slot is not None
        is_busy = self.machine.step()
        assert is_busy or not before, "requests are left, and nothing is computed"
        if held and oldest.finish_reason is None:
            assert oldest.slot is not None, "the first request was preempted"

    @precondition(lambda self: len(self.machine.in_flight) < 2)
    @rule()
    def dispatch(self):
        self.machine.dispatch()

    @precondition(lambda self: self.machine.in_flight)
    @rule()
    def read_back(self):
        self.machine.read_back()

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.requests))
        self.machine.scheduler.abort(request)
        self.machine.scheduler.abort(request)

    @rule()
    def wait(self):
        self.now += 1
        for request in self.machine.scheduler.end_overdue(self.now):
            assert request.finish_reason == "timeout" and request.deadline <= self.now

    @invariant()
    def holds(self):
        type(self).num_events += 1  # called once before the first event, and after each
        self.machine.check()
        for request in self.requests:
            assert len(request.ids) <= request.max_tokens + 1

    def teardown(self):
        if not hasattr(self, "machine"):
            return
        type(self).num_events -= 1
        left = sum(r.max_tokens for r in self.alive)
        # Everyone computes all they have once more whenever anybody is preempted, at worst.
        self.machine.run(50 + 10 * left)
        assert self.machine.scheduler.pool.num_used == 0
        for request in self.requests:
            expected = continuation(request)
            if request.finish_reason in ("stop", "length"):
                assert request.tokens == expected
                is_stop = expected[-1] in request.stop_ids
                assert (request.finish_reason == "stop") == is_stop
            else:
                assert request.tokens == expected[: len(request.tokens)]


class DeterministicRequests(Requests):
    deterministic = True


@pytest.mark.parametrize("machine", [Requests, DeterministicRequests])
@pytest.mark.parametrize("num_events", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_whatever_happens(machine, num_events):
    """Rules, invariants and `teardown` say what must hold; here, that there were so many events."""
    machine.num_events = 0
    options = {"stateful_step_count": 50, "deadline": None, "derandomize": True}
    # Many examples have fewer events than the 50 that they may have.
    run_state_machine_as_test(machine, settings=settings(max_examples=num_events // 30, **options))
    assert machine.num_events >= num_events
