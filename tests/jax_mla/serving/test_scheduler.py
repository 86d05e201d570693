"""The scheduler, with a machine of plain Python in place of the device."""

import subprocess
import sys

import pytest
from serving_machine import Machine, continuation

from jax_mla.serving.request import Request, RequestOptions
from jax_mla.serving.scheduler import Scheduler


def machine(**sizes) -> Machine:
    sizes = {
        "num_pages": 32, "page_size": 4, "max_batch": 4, "chunk_tokens": 16, "max_tokens": 64
    } | sizes  # fmt: skip
    return Machine(Scheduler(**sizes))


def submit(m: Machine, prompt, max_new_tokens=4, **options) -> Request:
    fork_of, deadline = options.pop("fork_of", None), options.pop("deadline", None)
    stop_ids = options.pop("stop_ids", ())
    request = Request(
        prompt, max_new_tokens=max_new_tokens, options=RequestOptions(**options), fork_of=fork_of,
        deadline=deadline, stop_ids=stop_ids,
    )  # fmt: skip
    m.scheduler.submit(request)
    return request


def prompt(length, first=0):
    return [(first + i * i) % 5 for i in range(length)]


def test_who_is_preempted_has_no_row_in_the_step():
    """The end of a prompt would share a chunk step with the request that takes its pages."""
    m = machine(num_pages=6, page_size=1, chunk_tokens=4)
    low = submit(m, prompt(5), 1)
    m.step()
    m.read_back()
    high = submit(m, prompt(3, first=1), 1, priority=1)
    m.run(100)
    assert m.scheduler.counters.preemptions == 1
    assert (low.tokens, high.tokens) == (continuation(low), continuation(high))


def test_needs_no_jax():
    code = (
        "import sys, jax_mla.serving.invariants, jax_mla.serving.scheduler\n"
        "found = {'jax', 'flax', 'numpy'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 60])
@pytest.mark.parametrize("deterministic", [False, True])
def test_one_request(length, deterministic):
    m = machine(deterministic=deterministic)
    request = submit(m, prompt(length))
    m.run(100)
    assert request.tokens == continuation(request) and request.finish_reason == "length"
    assert m.scheduler.pool.num_used == 0
    assert m.scheduler.counters.computed_tokens == length + 3


def test_an_end_token_ends():
    m = machine()
    request = submit(m, prompt(6), 30, stop_ids=(0, 1))
    m.run(100)
    assert request.tokens == continuation(request) and request.finish_reason == "stop"
    assert len(request.tokens) < 30 and request.tokens[-1] in (0, 1)


def test_a_second_request_computes_only_the_end():
    m = machine()
    first = submit(m, prompt(22), 1)
    m.run(100)
    before = m.scheduler.counters.computed_tokens
    second = submit(m, prompt(22), 1)
    m.run(100)
    assert m.scheduler.counters.computed_tokens - before == 2
    assert first.tokens == second.tokens and second.num_hit_tokens == 20


@pytest.mark.parametrize("shared", [1, 3, 4, 5, 7, 8, 10, 15])
def test_a_partial_match_is_copied(shared):
    m = machine()
    submit(m, [0] * 16, 1)
    m.run(100)
    before = m.scheduler.counters.computed_tokens
    request = submit(m, [0] * shared + [1] * 5, 1)
    m.run(100)
    assert m.scheduler.counters.computed_tokens - before == 5
    assert m.scheduler.counters.page_copies == (shared % 4 > 0)
    assert request.tokens == continuation(request)


def test_another_salt_shares_nothing():
    m = machine()
    for salt in ("a", "b", "a"):
        submit(m, prompt(22), 1, cache_salt=salt)
        m.run(100)
    assert m.scheduler.counters.hit_tokens == 20


@pytest.mark.parametrize("length", [1, 2, 4, 5, 9, 10])
def test_forks_share_the_full_pages_of_their_prompt(length):
    m = machine()
    parent = submit(m, prompt(length), 8)
    forks = [submit(m, prompt(length), 8, seed=i, fork_of=parent) for i in (1, 2, 3)]
    most, pages = 0, 0
    while m.step():
        m.check()
        running = [r for r in m.scheduler.running if not r.is_prefilling]
        if len(running) == 4 and (length - 1) // 4 > 0:
            pages = {tuple(r.table[: (length - 1) // 4]) for r in running}
            assert len(pages) == 1
        most = max(most, len(running))
    assert most == 4
    assert m.scheduler.counters.page_copies == (3 if (length - 1) % 4 else 0)
    assert m.scheduler.counters.computed_tokens == length + 3 + 4 * 7
    for request in (parent, *forks):
        assert request.tokens == continuation(request)
    assert m.scheduler.pool.num_used == 0


def test_chunks_and_decoding_alternate():
    m = machine(max_tokens=200, num_pages=64)
    submit(m, prompt(3), 40)
    for _ in range(3):
        m.step()
    submit(m, prompt(120, first=1), 2)
    kinds = []
    while m.dispatch():
        kinds.append(m.in_flight[-1].step.kind)
        if len(m.in_flight) > 1:
            m.read_back()
    assert "".join(k[0] for k in kinds).startswith("cd" * 8)


def test_short_prompts_share_a_chunk():
    m = machine()
    requests = [submit(m, prompt(4, first=i), 2) for i in range(4)]
    assert m.dispatch() and len(m.in_flight[0].step.rows) == 4
    m.run(100)
    assert all(r.tokens == continuation(r) for r in requests)


def test_the_younger_is_preempted_and_loses_nothing():
    m = machine(num_pages=8, max_tokens=31)
    old, young = submit(m, prompt(9), 20), submit(m, prompt(9, first=1), 20)
    while m.step():
        m.check()
        assert old.slot is not None or old.finish_reason
    assert m.scheduler.counters.preemptions > 0
    assert old.tokens == continuation(old) and young.tokens == continuation(young)


def test_preemption_mostly_hits_what_it_left():
    m = machine(num_pages=9, max_tokens=31)
    submit(m, prompt(9), 20)
    young = submit(m, prompt(9, first=1), 20)
    m.run(500)
    assert m.scheduler.counters.preemptions > 0
    assert m.scheduler.counters.hit_tokens > 0 and young.tokens == continuation(young)


@pytest.mark.parametrize("max_batch", [1, 4])
def test_higher_priority_runs_first_and_takes_what_it_needs(max_batch):
    m = machine(num_pages=8, max_tokens=31, max_batch=max_batch)
    low = submit(m, prompt(9), 20)
    for _ in range(6):
        m.step()
    high = submit(m, prompt(20, first=1), 4, priority=1)
    while high.finish_reason is None:
        assert m.step()
        m.check()
    assert low.finish_reason is None
    m.run(500)
    assert low.tokens == continuation(low) and high.tokens == continuation(high)


def test_a_deadline_ends_a_request_as_it_is():
    m = machine()
    request, waiting = submit(m, prompt(5), 40, deadline=10.0), submit(m, prompt(5), 2)
    for _ in range(8):
        m.step()
    assert m.scheduler.end_overdue(9.0) == []
    assert m.scheduler.end_overdue(10.0) == [request]
    written = len(request.tokens)
    m.run(100)
    assert request.finish_reason == "timeout" and len(request.tokens) == written
    assert request.tokens == continuation(request)[:written]
    assert waiting.finish_reason == "length" and m.scheduler.pool.num_used == 0


@pytest.mark.parametrize("steps", range(12))
def test_abort_anywhere(steps):
    """Waiting, in chunks, decoding, preempted; twice."""
    m = machine(num_pages=12, max_batch=2, max_tokens=47)
    requests = [submit(m, prompt(17, first=i), 12) for i in range(4)]
    for _ in range(steps):
        m.step()
    for request in requests:
        m.scheduler.abort(request)
        m.check()
        m.scheduler.abort(request)
        m.check()
    while m.in_flight:
        m.read_back()
        m.check()
    assert not m.step()
    assert m.scheduler.pool.num_used == 0 and not m.scheduler.copies
    assert {r.finish_reason for r in requests} <= {"abort", "length"}


def test_abort_between_admission_and_the_step_that_copies():
    m = machine(num_pages=5)
    submit(m, [0] * 4, 1)
    m.run(100)
    growing = [submit(m, [i] * 3, 10) for i in (1, 2)]
    while not all(request.num_cached == 4 for request in growing):
        m.step()
    copied = submit(m, [0] * 3, 5)
    assert not m.dispatch() and m.scheduler.copies  # admitted, and no page is left to grow
    m.scheduler.abort(copied)
    assert not m.scheduler.copies
    m.check()
    m.run(100)
    assert m.scheduler.pool.num_used == 0
    assert all(request.tokens == continuation(request) for request in growing)


def test_deterministic_chunks_begin_at_multiples():
    m = machine(deterministic=True, num_pages=24, max_batch=2, max_tokens=47)
    requests = [submit(m, prompt(37 if i else 16, first=i % 2), 9) for i in range(6)]
    while m.dispatch():
        m.check()
        for row in m.in_flight[-1].step.rows:
            if m.in_flight[-1].step.kind == "chunk":
                assert row.start % 16 == 0 and len(m.in_flight[-1].step.rows) == 1
                assert row.start + row.count <= len(row.request.prompt)
        while len(m.in_flight) > 1 or (m.in_flight and not m.scheduler.running):
            m.read_back()
    m.run(2000)
    assert m.scheduler.counters.hit_tokens > 0
    for request in requests:
        assert request.tokens == continuation(request)


def test_what_can_never_fit_is_refused():
    m = machine(num_pages=4, max_tokens=64)
    with pytest.raises(ValueError, match=r"13 tokens and 5 new ones need 5 pages of 4 .* has 4"):
        submit(m, prompt(13), 5)
    submit(m, prompt(13), 4)
    with pytest.raises(ValueError, match=r"60 tokens and 6 new ones must be at most 65 together"):
        submit(machine(), prompt(60), 6)
    m.run(100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be an integer from 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be"),
        ({"min_tokens": 1.5}, "min_tokens must be an integer of at least 0, got 1.5"),
        ({"logprobs": 21}, "logprobs must be an integer from 0 to 20, got 21"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0, got 0"),
        ({"presence_penalty": 3}, "presence_penalty must be from -2 to 2, got 3"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be from -2 to 2, got nan"),
        ({"timeout_s": 0}, "timeout_s must be above 0 or None, got 0"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias must be below infinity, got inf of id 3"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RequestOptions(**options)


def test_more_biased_tokens_than_a_program_takes_are_refused():
    options = RequestOptions(logit_bias=dict.fromkeys(range(319), 1.0))
    Request([1], max_new_tokens=1, options=options, stop_ids=(2,))
    with pytest.raises(ValueError, match="must be at most 320 ids, got 319 and 2"):
        Request([1], max_new_tokens=1, options=options, stop_ids=(2, 3))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_pages": 0}, "num_pages must be an integer of at least 1, got 0"),
        ({"max_batch": 0}, "max_batch must be"),
        ({"deterministic": True, "chunk_tokens": 6}, "multiple of page_size=4 .* got 6"),
    ],
)
def test_sizes_out_of_range(sizes, message):
    with pytest.raises(ValueError, match=message):
        machine(**sizes)


def test_a_prompt_has_tokens():
    with pytest.raises(ValueError, match="at least 1 token"):
        Request([], max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens must be an integer of at least 1, got 0"):
        Request([1], max_new_tokens=0)
