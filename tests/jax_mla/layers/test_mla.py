"""Latent attention: the two forms agree, and both agree with the equations written out in numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernel_tools.aot import lower_for_cuda
from numerics import assert_close, normal

import jax_mla
from jax_mla.layers.mla import attend
from jax_mla.layers.mla.forms import choose_form
from jax_mla.layers.rope import positions_of, rope_tables
from pallas_kernels import hardware

CONFIG = dataclasses.replace(jax_mla.tiny(), initializer_range=0.2)
VARIANTS = {
    "q_lora": CONFIG,
    "no_q_lora": dataclasses.replace(CONFIG, q_lora_rank=None),
    "half_rope": dataclasses.replace(CONFIG, rope_interleave=False),
    "bias": dataclasses.replace(CONFIG, attention_bias=True),
    "no_yarn_wide_value": dataclasses.replace(CONFIG, rope_scaling=None, v_head_dim=48),
}


def layer(config, seed=0):
    """An MLA layer whose norms and biases are not the 1 and 0 of a new one."""
    mla = jax_mla.MLA(config, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(mla)
    rng = np.random.default_rng(seed)
    nudge = lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(nudge, state))


def tables_of(config, x):
    """Cosines and sines of the positions of "B T D", which count from 0."""
    return rope_tables(
        positions_of(x[..., 0]), config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    )


def written_out(mla, x):
    """The layer in float64, one head and one query at a time."""
    config = mla.config
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(mla)))
    x = np.asarray(x, np.float64)
    bias = lambda linear: linear.get("bias", 0)  # noqa: E731
    P, C = config.qk_nope_head_dim, config.kv_lora_rank
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        q_c = x[b]
        q_w = w.get("q_proj", {}).get("weight")
        if config.q_lora_rank is not None:
            q_c = norm(x[b] @ w["q_a_proj"]["weight"] + bias(w["q_a_proj"]), w["q_a_layernorm"])
            q_w = w["q_b_proj"]["weight"]
        row = x[b] @ w["kv_a_proj_with_mqa"]["weight"] + bias(w["kv_a_proj_with_mqa"])
        latent, k_pe = norm(row[:, :C], w["kv_a_layernorm"]), turn(row[:, C:], config)
        for n in range(config.num_attention_heads):
            q = q_c @ q_w[:, n]
            q_pe = turn(q[:, P:], config)
            k_b, v_b = w["k_b_proj"]["weight"][n], w["v_b_proj"]["weight"][n]
            keys, values = latent @ k_b.T, latent @ v_b.T
            for t in range(x.shape[1]):
                scores = (keys[: t + 1] @ q[t, :P] + k_pe[: t + 1] @ q_pe[t]) * scale(config)
                p = np.exp(scores - scores.max())
                out[b, t] += (p / p.sum()) @ values[: t + 1] @ w["o_proj"]["weight"][n]
    return out + bias(w["o_proj"])


def norm(x, weights):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights["weight"]


def scale(config):
    yarn = config.rope_scaling
    m = 1.0 if yarn is None else 0.1 * yarn.mscale_all_dim * np.log(yarn.factor) + 1
    return (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5 * m**2


def turn(x, config):
    """Each pair as a complex number, times exp(i * position * frequency)."""
    R, yarn = config.qk_rope_head_dim, config.rope_scaling
    frequency = config.rope_theta ** (-np.arange(0, R, 2) / R)
    if yarn is not None:
        rotations = yarn.original_max_position_embeddings / (2 * np.pi)
        index = lambda beta: R * np.log(rotations / beta) / (2 * np.log(config.rope_theta))  # noqa: E731
        low, high = max(np.floor(index(32)), 0), min(np.ceil(index(1)), R - 1)
        ramp = np.clip((np.arange(R // 2) - low) / (high - low), 0, 1)
        frequency = frequency * (1 - ramp) + frequency / yarn.factor * ramp
    pairs = x.reshape(len(x), R // 2, 2) if config.rope_interleave else x.reshape(len(x), 2, -1)
    z = (
        pairs[..., 0] + 1j * pairs[..., 1]
        if config.rope_interleave
        else pairs[:, 0] + 1j * pairs[:, 1]
    )
    z = z * np.exp(1j * np.arange(len(x))[:, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_equations(variant, form, rng):
    mla = layer(VARIANTS[variant])
    x = normal(rng, (2, 37, CONFIG.hidden_size))
    got = jax.jit(lambda x: mla(x, form=form))(x)
    assert_close(got, written_out(mla, x), "float32")


def test_gradients_of_both_forms_agree(rng):
    graphdef, state = nnx.split(layer(VARIANTS["bias"]))
    x = normal(rng, (2, 21, CONFIG.hidden_size))
    dy = normal(rng, x.shape)

    def loss(state, x, form):
        return jnp.sum(nnx.merge(graphdef, state)(x, form=form) * dy)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    expanded, absorbed = grad(state, x, "expanded"), grad(state, x, "absorbed")
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), expanded, absorbed)


def test_bfloat16_stays_near_float32(rng):
    """Judged by the error's size over all outputs, on the same rounded weights and inputs."""
    config = dataclasses.replace(VARIANTS["q_lora"], dtype="bfloat16")
    narrow = layer(config)
    graphdef, state = nnx.split(narrow)
    wide = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype("float32"), state))
    x = normal(rng, (2, 33, CONFIG.hidden_size), "bfloat16")
    for form in ("expanded", "absorbed"):
        got, want = (
            np.asarray(jax.jit(functools.partial(mla, form=form))(x), np.float32)
            for mla, x in ((narrow, x), (wide, x.astype("float32")))
        )
        # Six roundings of 2**-9 in a row: projection, norm, rope, keys, attention, output.
        assert np.sqrt(((got - want) ** 2).mean() / (want**2).mean()) < 1.5e-2


@pytest.mark.parametrize(
    ("num_queries", "num_cached", "form"),
    [(1, 1, "absorbed"), (1, 4096, "absorbed"), (4, 65536, "absorbed"), (64, 8192, "absorbed"),
     (512, 0, "expanded"), (4096, 0, "expanded"), (512, 65536, "expanded")],
)  # fmt: skip
def test_decoding_absorbs_and_prefill_expands(num_queries, num_cached, form):
    for config in (jax_mla.v3(), jax_mla.v2_lite()):
        assert choose_form(config, num_queries, num_cached) == form


def test_merging_many_blocks_of_context_does_not_add_rounding(monkeypatch, rng):
    """In bfloat16 a cache attended in 32 blocks is as near to float32 as one attended in 1."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    mla = layer(config)
    x = normal(rng, (1, 260, CONFIG.hidden_size), "bfloat16")
    whole = jax.jit(functools.partial(mla, form="expanded"))(x)
    want = np.asarray(whole[:, 256:], np.float32)
    new, last = jnp.asarray([256]), jnp.asarray([4])

    def in_two_chunks(x, cache):
        tables = tables_of(config, x)
        first, second = (tuple(t[:, s] for t in tables) for s in (slice(256), slice(256, 260)))
        options = {"has_context": False, "form": "expanded"}
        _, cache = mla.prefill(x[:, :256], cache, 0, first, num_new=new, **options)
        return mla.prefill(x[:, 256:], cache, 0, second, num_new=last, form="expanded")[0]

    cache = jax_mla.LatentCache.empty(
        dataclasses.replace(config, num_hidden_layers=1), 1, 264, page_size=8
    )
    errors = []
    for block in (8, 256):
        monkeypatch.setattr(attend, "CONTEXT_BLOCK", block)
        got = np.asarray(jax.jit(lambda *x: in_two_chunks(*x))(x, cache), np.float32)
        errors.append(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))
    assert errors[0] < 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_ragged_chunks_over_a_cache_of_many_blocks_equal_the_equations(form, monkeypatch, rng):
    """Expanded, the cache is attended in blocks of 8 tokens, and all of it merged by lse."""
    monkeypatch.setattr(attend, "CONTEXT_BLOCK", 8)
    mla = layer(CONFIG)
    x = normal(rng, (3, 41, CONFIG.hidden_size))
    want, tables = written_out(mla, x), tables_of(CONFIG, x)
    config = dataclasses.replace(CONFIG, num_hidden_layers=1)
    cache = jax_mla.LatentCache.empty(config, 3, 48, page_size=8)

    @jax.jit
    def prefill(x, cache, tables, num_new):
        return mla.prefill(x, cache, 0, tables, num_new=num_new, form=form)

    row, done = np.arange(3)[:, None], np.zeros(3, int)
    for new in (np.array([20, 0, 3]), np.array([7, 13, 9]), np.array([14, 1, 0])):
        at = np.minimum(done[:, None] + np.arange(20), 40)
        got, cache = prefill(x[row, at], cache, tuple(t[row, at] for t in tables), jnp.asarray(new))
        is_new = np.arange(20) < new[:, None]
        assert_close(got[is_new], want[row, at][is_new], "float32")
        done += new


def test_expanded_prefill_over_a_cache_is_two_calls_of_the_kernel(monkeypatch):
    """Of the new tokens, and of a block of the cache in a loop."""
    monkeypatch.setattr(hardware, "missing_gpu", lambda *_: None)
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    config = dataclasses.replace(
        CONFIG, **sizes, v_head_dim=128, dtype="bfloat16", num_hidden_layers=1
    )
    mla = jax_mla.MLA(config, rngs=nnx.Rngs(0))

    def prefill(x, cache, num_new):
        return mla.prefill(x, cache, 0, tables_of(config, x), num_new=num_new, form="expanded")

    cache = jax.eval_shape(lambda: jax_mla.LatentCache.empty(config, 2, 1024))
    x = jax.ShapeDtypeStruct((2, 200, CONFIG.hidden_size), "bfloat16")
    text = lower_for_cuda(prefill, x, cache, jax.ShapeDtypeStruct((2,), "int32"))
    assert "flash_attention_forward" in text and text.count("mosaic_gpu_v2") == 2


def test_segments_do_not_see_each_other(rng):
    mla = layer(CONFIG)
    x = normal(rng, (1, 24, CONFIG.hidden_size))
    ids = jnp.asarray([[0] * 10 + [1] * 14], jnp.int32)
    for form in ("expanded", "absorbed"):
        run = jax.jit(functools.partial(mla, form=form))
        packed = run(x, segment_ids=ids)
        assert_close(packed[:, :10], run(x[:, :10]), "float32")
        assert_close(packed[:, 10:], run(x[:, 10:]), "float32")
