"""How deep a call goes, and what the core of a loop may not do."""

import sys
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

import jax_mla
from jax_mla import functional
from jax_mla.layers.mla import attend

CONFIG = jax_mla.tiny()
PACKAGE = str(Path(jax_mla.__file__).parent)
TOKEN = np.zeros((2, 1), np.int32)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_at_most_seven_frames_from_decode_step_to_the_op(params, monkeypatch):
    seen = []
    op = attend.mla_decode

    def watched(*args, **options):
        stack = traceback.extract_stack(sys._getframe(1))
        seen.append([frame.name for frame in stack if frame.filename.startswith(PACKAGE)])
        return op(*args, **options)

    monkeypatch.setattr(attend, "mla_decode", watched)
    jax.clear_caches()
    jax_mla.decode_step(params, CONFIG, TOKEN[:, 0], jax_mla.LatentCache.empty(CONFIG, 2, 64))
    assert seen
    for frames in seen:
        assert frames[0] == "decode_step" and len(frames) <= 7, frames
        assert "<lambda>" not in frames


def test_the_core_of_a_loop_checks_and_reads_nothing(params, monkeypatch):
    """The same numbers, from functions that see lengths and tables as tracers only."""
    cache = jax_mla.LatentCache.empty(CONFIG, 2, 64)
    prompt, lengths = np.full((2, 5), 7, np.int32), np.array([5, 3], np.int32)
    want, filled = jax_mla.prefill(params, CONFIG, prompt, cache, lengths=lengths, form="absorbed")
    want_next, _ = jax_mla.decode_step(params, CONFIG, TOKEN[:, 0], filled)

    def refuse(*_, **__):
        pytest.fail("a check of values in the core")

    for name in ("check_tokens", "check_lengths", "check_cache", "longest", "check_split"):
        monkeypatch.setattr(functional, name, refuse)

    @jax.jit
    def loop(params, prompt, cache, lengths, token):
        options = {"has_context": False, "form": "absorbed"}
        logits, cache = functional.unchecked_prefill(
            params, CONFIG, prompt, cache, lengths, **options
        )
        return logits, functional.unchecked_decode_step(params, CONFIG, token, cache)[0]

    arrays = jnp.asarray(prompt), cache, jnp.asarray(lengths), jnp.asarray(TOKEN[:, 0])
    got, got_next = loop(params, *arrays)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got_next, want_next)
