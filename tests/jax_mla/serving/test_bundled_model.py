"""The bundled model, in float32: the engine against `generate`, with prompts of all lengths."""

import dataclasses

import jax
import numpy as np
import pytest

import jax_mla
from jax_mla.serving import Engine


@pytest.mark.slow
def test_prompts_of_all_lengths_that_arrive_at_random(rng):
    folder = next(iter(jax_mla.__path__)) + "/demo/model"
    params, config = jax_mla.load(folder)
    params = jax.tree.map(lambda x: x.astype("float32"), params)
    config = dataclasses.replace(config, dtype="float32")
    lengths = rng.integers(1, 701, 32)
    tokens = np.zeros((32, 700), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(0, 256, length)
    want = jax_mla.generate(params, config, tokens, lengths=lengths, max_new_tokens=48)

    engine = Engine(
        params, config, num_pages=40, max_batch=8, chunk_tokens=64, max_tokens=1024, paranoid=True
    )
    order, requests = rng.permutation(32).tolist(), {}
    while order or not engine.is_idle:
        if order and rng.random() < 0.2:
            row = order.pop()
            prompt = tokens[row, : lengths[row]].tolist()
            requests[row] = engine.submit(prompt, max_new_tokens=48)
        engine.step()
    assert engine.stats.preemptions > 0 and engine.stats.pages_in_use == 0
    for row, request in requests.items():
        assert request.tokens == want.tokens[row, : want.lengths[row]].tolist()
