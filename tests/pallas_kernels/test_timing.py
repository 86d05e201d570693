"""Timing: every call is made, nothing else is in the loop, and how many calls make a sample."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_tools.aot import compile_sm90a

from pallas_kernels import timing
from pallas_kernels.mla_decode.workloads import Workload


def test_every_call_of_the_loop_is_made_and_the_last_result_returned():
    calls = []

    def function(x, y):
        jax.debug.callback(lambda x: calls.append(int(x)), x, ordered=True)
        return x + y, {"product": x * y}

    total, rest = timing.repeat(function, 3)((2, 10), (5, 100))
    jax.effects_barrier()
    assert calls == [2, 5] * 3
    assert (total, rest["product"]) == (105, 500)


def test_samples_are_seconds_a_call(monkeypatch):
    """A clock that advances by 0.3 s whenever it is read, for a program of 3 calls."""
    clock = iter(np.arange(0, 100, 0.3))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    samples = timing.sample(lambda: jnp.zeros(1), calls=3)
    np.testing.assert_allclose(samples, 0.1)
    assert sum(samples) * 3 >= timing.TOTAL_SECONDS and len(samples) <= timing.SAMPLES


def test_on_a_gpu_argument_sets_are_taken_in_turns_in_a_loop(monkeypatch):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "TOTAL_SECONDS", 0)
    calls = []

    def function(x):
        jax.debug.callback(lambda x: calls.append(int(x)), x, ordered=True)
        return 2 * x

    result, samples = timing.measure(function, [(1,), (2,)], floor_seconds=0.001)
    jax.effects_barrier()
    assert result == 4 and len(samples) == 1 and samples[0] > 0
    rounds = round(timing.SAMPLE_SECONDS / 0.004)
    assert calls == [1, 2] * rounds * 2  # to warm up, and once for a sample


def test_rates_of_the_device_are_measured(monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 2**20)
    monkeypatch.setattr(timing, "MATMUL_SIZE", 64)
    monkeypatch.setattr(timing, "SAMPLES", 2)
    assert 1e6 < timing.copy_bytes_per_second.__wrapped__() < 1e13
    assert 1e6 < timing.matmul_flops_per_second.__wrapped__() < 1e16


@pytest.mark.parametrize(
    ("num_bytes", "copies"), [(1e12, 1), (4 * 64 * 2**20, 1), (61e6, 5), (100e6, 3)]
)
def test_copies_together_are_larger_than_the_cache(num_bytes, copies):
    assert timing.num_copies(num_bytes) == copies
    assert copies == 1 or copies * num_bytes >= 4 * timing.CACHE_BYTES


@pytest.mark.kernel_aot
def test_loop_on_a_gpu_holds_the_kernels_and_its_counter_only():
    """A copy, or an argument made anew in every round, would be timed along."""
    from pallas_kernels.mla_decode.sm90.launch import mla_decode_sm90

    workload = Workload(B=4, T=1, N=16, S=4096)
    decode = functools.partial(mla_decode_sm90, latent_dim=512, scale=0.04, causal=True)

    def function(q, kv_pages, page_table, lengths, plan):
        return decode(q, kv_pages, page_table, lengths, plan=plan)

    shapes = jax.eval_shape(workload.arrays)
    program = compile_sm90a(timing.repeat(function, 10), shapes)
    computations = re.findall(r"\n%\S+ \(.*?\n}", program.hlo, re.DOTALL)
    (body,) = [text for text in computations if " custom-call(" in text]
    work = re.findall(r" (fusion|custom-call|copy\S*|while|dynamic\S*)\(", body)
    assert sorted(work) == ["custom-call"] * len(program.kernels) + ["fusion"], body
