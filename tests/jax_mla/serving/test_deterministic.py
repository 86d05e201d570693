"""deterministic=True: every bit of a request is its own."""

import jax
import numpy as np
import pytest

import jax_mla
from jax_mla.serving import Engine, RequestOptions

PAGE, CHUNK = 16, 32


def engine(config, num_pages):
    params = jax_mla.init(jax.random.key(0), config)
    return Engine(
        params, config, num_pages=num_pages, page_size=PAGE, max_batch=4, chunk_tokens=CHUNK,
        max_tokens=160, deterministic=True, paranoid=True,
    )  # fmt: skip


def bits(request):
    values = [[x.logprob, *(p for _, p in x.top)] for x in request.logprobs]
    return request.tokens, np.asarray(values, np.float32).tobytes()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(1)
    shared = rng.integers(0, 256, 70).tolist()
    ends = [rng.integers(0, 256, n).tolist() for n in (1, 9, 40, 64)]
    return [*(shared + end for end in ends), *ends]


def options(i, salt=""):
    return RequestOptions(seed=i, logprobs=3, stop_token_ids=(), cache_salt=salt)


SAMPLING = jax_mla.SamplingOptions(temperature=0.8, top_p=0.95)


@pytest.fixture(scope="module")
def small(config):
    """Two long requests do not fit into its pages at once."""
    return engine(config, 14)


@pytest.fixture(scope="module")
def alone(small, prompts):
    """Each with nothing beside it, and nothing to share."""
    found = []
    for i, prompt in enumerate(prompts):
        own = options(i, salt=str(i))
        request = small.submit(prompt, SAMPLING, max_new_tokens=12, options=own)
        list(small.run())
        found.append(bits(request))
    return found


def serve(e, rng, prompts, alone):
    """Random arrivals, and some that are aborted."""
    order = rng.permutation(len(prompts)).tolist()
    running = []
    while order or not e.is_idle:
        if order and rng.random() < rng.choice([0.1, 0.9]):
            i = order.pop()
            running.append(
                (i, e.submit(prompts[i], SAMPLING, max_new_tokens=12, options=options(i)))
            )
        e.step()
        if rng.random() < 0.02 and running:
            e.abort(running[-1][1])
    for i, request in running:
        if request.finish_reason != "abort":
            assert bits(request) == alone[i]


@pytest.mark.parametrize("seed", range(3))
def test_bits_are_equal_under_any_schedule(seed, small, prompts, alone):
    before = small.stats
    serve(small, np.random.default_rng(seed), prompts, alone)
    assert small.stats.pages_in_use == 0
    assert small.stats.steps > before.steps


@pytest.mark.slow
def test_bits_are_equal_under_two_hundred_schedules(small, prompts, alone):
    before = small.stats
    for seed in range(200):
        serve(small, np.random.default_rng(seed), prompts, alone)
    assert small.stats.preemptions > before.preemptions
    assert small.stats.hit_tokens > before.hit_tokens
