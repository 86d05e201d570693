"""Long sequences over devices: striped prompts, and caches whose pages are split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_tools import aot
from layouts import MESH_LAYOUTS
from numerics import assert_close, normal
from weights import random_params

import jax_mla
from jax_mla.cache.shards import own_lengths
from jax_mla.layers.mla.attend import NewTokens, attend_new, merge_over_devices
from jax_mla.layers.mla.on_mesh import from_stripes, to_stripes
from jax_mla.layers.mla.stripes import gather_stripes, stripe_order
from jax_mla.sharding.placement import Placement, partition_spec
from jax_mla.training import Recipe, next_token_loss
from jax_mla.training.batch import check_rows
from pallas_kernels import hardware

CONFIG = dataclasses.replace(
    jax_mla.tiny(),
    initializer_range=0.1,
    num_attention_heads=4,
    num_hidden_layers=2,
    first_k_dense_replace=2,  # no experts: what is split here are positions
)
LAYOUT = MESH_LAYOUTS["context"]
RULES, SHARDS = LAYOUT.rules, LAYOUT.axes["sequence"]
B, T = 4, 32


@pytest.fixture(scope="module")
def mesh():
    return LAYOUT.mesh()


@pytest.fixture(scope="module")
def config():
    return CONFIG


@pytest.fixture(scope="module")
def placed(params):
    return LAYOUT.place(params, CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (B, T))


@pytest.mark.parametrize("num_devices", [2, 4, 8])
def test_stripes_are_paired_late_with_early_and_put_back(num_devices):
    mesh = jax_mla.make_mesh(sequence=num_devices)
    place, size = Placement(mesh.abstract_mesh, RULES), 3
    x = np.arange(2 * num_devices * size).reshape(1, -1, 1)
    given = jax.device_put(
        x, NamedSharding(mesh, partition_spec(RULES, ("batch", "sequence", None)))
    )
    striped = jax.jit(lambda x: to_stripes(x, place))(given)
    for d, shard in enumerate(striped.addressable_shards):
        held = np.asarray(shard.data).reshape(2, size)
        early, late = d, 2 * num_devices - 1 - d
        np.testing.assert_array_equal(held[:, 0], [early * size, late * size])
        np.testing.assert_array_equal(np.diff(held, axis=1), 1)
    np.testing.assert_array_equal(jax.jit(lambda x: from_stripes(x, place))(striped), x)
    gathered = jax.shard_map(
        lambda x: gather_stripes(x, ("sequence",)),
        mesh=mesh,
        in_specs=P(None, "sequence"),
        out_specs=P(),
        check_vma=False,
    )(striped)
    np.testing.assert_array_equal(gathered, x)


@pytest.mark.parametrize("form", ["expanded", pytest.param("absorbed", marks=pytest.mark.slow)])
def test_every_device_sees_equally_many_keys(form, mesh, rng):
    """With queries of 0 all keys weigh the same: the sum of exponentials counts them."""
    N, C, X = CONFIG.num_attention_heads, CONFIG.kv_lora_rank, CONFIG.cache_row_dim
    nope, rotary, value = CONFIG.qk_nope_head_dim, CONFIG.qk_rope_head_dim, CONFIG.v_head_dim
    zeros = jnp.zeros((1, T, N, nope)), jnp.zeros((1, T, N, rotary))
    rows = normal(rng, (1, T, X))
    weights = normal(rng, (N, nope, C)), normal(rng, (N, value, C))
    options = {"config": CONFIG, "form": form, "sequence_axes": ("sequence",)}
    _, lse = jax.jit(
        jax.shard_map(
            lambda *new: attend_new(NewTokens(*new), **options),
            mesh=mesh,
            in_specs=(P(None, "sequence"), P(None, "sequence"), P(None, "sequence"), P(), P()),
            out_specs=P(None, "sequence"),
            check_vma=False,
        )
    )(*zeros, rows, *weights)
    seen = np.exp(np.asarray(lse)[0, :, 0]).round().astype(int).reshape(2 * SHARDS, -1)
    position = np.arange(T).reshape(2 * SHARDS, -1)[stripe_order(SHARDS)]
    np.testing.assert_array_equal(seen, position + 1)
    assert set(seen.reshape(SHARDS, -1).sum(axis=1)) == {T * (T + 1) // 2 // SHARDS}


@pytest.mark.slow
def test_trace_is_in_the_order_of_positions(tokens):
    config = dataclasses.replace(CONFIG, num_hidden_layers=1, first_k_dense_replace=0)
    params = random_params(config)
    want = jax_mla.forward_trace(params, config, tokens)
    params = LAYOUT.place(params, config)
    got = jax_mla.forward_trace(params, config, tokens, rules=RULES)
    assert_close(got.logits, want.logits, "float32")
    assert_close(got.hidden_states, want.hidden_states, "float32")
    np.testing.assert_array_equal(np.sort(got.expert_index), np.sort(want.expert_index))


def test_gradients_of_a_layer_with_packed_segments(rng):
    place = LAYOUT.placement()
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, T))))
    x, dy = (normal(rng, (B, T, CONFIG.hidden_size)) for _ in range(2))
    weights = nnx.split(jax_mla.MLA(CONFIG, rngs=nnx.Rngs(0)))[1]

    def gradients(weights, x, segments, place):
        def objective(weights, x):
            graphdef, _ = nnx.split(jax_mla.MLA(CONFIG, rngs=nnx.Rngs(0), placement=place))
            layer = nnx.merge(graphdef, weights)
            y = layer(to_stripes(x, place), segment_ids=to_stripes(segments, place))
            return jnp.sum(from_stripes(y, place) * dy)

        return jax.grad(objective, argnums=(0, 1))(weights, x)

    gradients = jax.jit(gradients, static_argnums=3)
    want = gradients(weights, x, segments, None)
    arrays = LAYOUT.replicate((weights, x, segments))
    jax.tree.map(lambda g, w: assert_close(g, w, "float32"), gradients(*arrays, place), want)


@pytest.mark.slow
def test_loss_and_gradients(params, placed, tokens):
    def value_and_grad(params, rules):
        def loss(params):
            return next_token_loss(params, CONFIG, tokens, rules=rules).loss

        return jax.jit(jax.value_and_grad(loss))(params)

    want, got = value_and_grad(params, None), value_and_grad(placed, RULES)
    jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)


def split_cache(kind, page_size=4, max_pages=12):
    if kind == "dense":
        max_tokens = page_size * max_pages
        return jax_mla.LatentCache.empty(
            CONFIG, B, max_tokens, page_size=page_size, num_shards=SHARDS
        )
    # Column j names pages of shard j % SHARDS, of which each part of the batch has a half.
    each = B // 2 * max_pages // SHARDS
    pools = np.random.default_rng(2).permuted(
        np.arange(SHARDS * 2 * each).reshape(-1, each), axis=1
    )
    pools = pools.reshape(SHARDS, B, max_pages // SHARDS)
    table = pools.transpose(1, 2, 0).reshape(B, max_pages)
    return jax_mla.PagedLatentCache.with_table(
        CONFIG, table, num_pages=table.size, page_size=page_size
    )


@pytest.mark.parametrize("kind", ["paged", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["absorbed", pytest.param("expanded", marks=pytest.mark.slow)])
def test_chunked_prefill_and_decode_on_a_split_cache(kind, form, placed, tokens, logits, mesh):
    at = np.arange(B)
    first, second = np.asarray([16, 9, 1, 12]), np.asarray([8, 12, 16, 0])
    cache, options = split_cache(kind), {"rules": RULES}
    got, cache = jax_mla.prefill(
        placed, CONFIG, tokens[:, :16], cache, lengths=first, form=form, **options
    )
    assert_close(got, logits[at, first - 1], "float32")
    chunk = np.stack([np.roll(row, -n)[:16] for row, n in zip(tokens, first, strict=True)])
    got, cache = jax_mla.prefill(placed, CONFIG, chunk, cache, lengths=second, form=form, **options)
    total = first + second
    assert_close(np.asarray(got)[second > 0], logits[at, total - 1][second > 0], "float32")
    for _ in range(2):
        got, cache = jax_mla.decode_step(placed, CONFIG, tokens[at, total], cache, **options)
        assert_close(got, logits[at, total], "float32")
        total = total + 1
    several = np.stack([tokens[at, total], tokens[at, total + 1]], axis=1)
    got, cache = jax_mla.decode_step(placed, CONFIG, several, cache, form=form, **options)
    assert_close(got[:, 0], logits[at, total], "float32")
    assert_close(got[:, 1], logits[at, total + 1], "float32")
    assert cache.lengths.tolist() == (total + 2).tolist()
    expected = NamedSharding(mesh, P(None, ("sequence", "data")))
    assert cache.pages.sharding.is_equivalent_to(expected, 4)


def test_generated_tokens(params, placed, tokens):
    options = {"lengths": np.asarray([16, 9, 1, 12]), "max_new_tokens": 4, "eos_token_ids": ()}
    want = jax_mla.generate(params, CONFIG, tokens[:, :16], **options)
    got = jax_mla.generate(placed, CONFIG, tokens[:, :16], rules=RULES, **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.kernel_aot
@pytest.mark.parametrize("program", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_kernels_compile_for_eight_h200s(program, monkeypatch):
    devices = aot.h200_devices(8)
    monkeypatch.setattr(hardware, "_device", lambda device: device or devices[0])
    mesh, config = jax_mla.make_mesh(sequence=8, devices=devices), dataclasses.replace(
        CONFIG, num_hidden_layers=1, dtype="bfloat16", num_attention_heads=16, kv_lora_rank=128,
        qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, rope_scaling=None,
    )  # fmt: skip

    def on_mesh(x, *axes):
        sharding = NamedSharding(mesh, partition_spec(RULES, axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    placed = LAYOUT.abstract_params(config, mesh)
    cache = jax.eval_shape(lambda: jax_mla.LatentCache.empty(config, 2, 4096, num_shards=8))
    pages = on_mesh(cache.pages, None, ("context", "batch"), None, None)
    cache = dataclasses.replace(cache, pages=pages, lengths=on_mesh(cache.lengths, "batch"))
    run = jax_mla.decode_step if program == "decode" else jax_mla.prefill
    shape = (2,) if program == "decode" else (2, 2048)
    tokens = on_mesh(jax.ShapeDtypeStruct(shape, "int32"), *("batch", "sequence")[: len(shape)])
    step = jax.jit(lambda p, t, c: run(p, config, t, c, rules=RULES))
    compiled = step.lower(placed, tokens, cache).compile()
    assert 'custom_call_target="mosaic_gpu_v2"' in compiled.as_text()
    rows, _ = jax_mla.explain_collectives(compiled)
    kinds = {row.kind for row in rows if row.bytes_per_device > 1e4}
    in_prefill = {"all-gather", "reduce-scatter", "all-reduce", "collective-permute"}
    assert kinds == ({"all-reduce"} if program == "decode" else in_prefill)


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 5))
def test_own_lengths_count_the_tokens_of_every_nth_page(length, page_size, num_shards):
    shard = np.arange(length) // page_size % num_shards
    lengths = jnp.asarray([length])
    for rank in range(num_shards):
        assert own_lengths(lengths, page_size, num_shards, rank) == (shard == rank).sum()


@pytest.mark.parametrize(("batch", "num_pages", "num_shards"), [(3, 24, 4), (2, 27, 3), (1, 7, 1)])
def test_tables_deal_pages_round_robin(batch, num_pages, num_shards):
    cache = jax_mla.PagedLatentCache.empty(CONFIG, num_pages, 1, batch=batch, num_shards=num_shards)
    table = np.asarray(cache.page_table)
    assert (
        table.size
        == len(set(table.ravel()))
        == num_pages // (batch * num_shards) * num_shards * batch
    )
    of_shard = num_pages // num_shards
    want = np.broadcast_to(np.arange(table.shape[1]) % num_shards, table.shape)
    np.testing.assert_array_equal(table // of_shard, want)


@pytest.mark.parametrize("scatter", [False, True], ids=["psum", "scatter"])
def test_merging_over_devices(scatter, mesh, rng):
    scores, values = rng.standard_normal((8, SHARDS * 3)), rng.standard_normal((SHARDS * 3, 5))
    is_seen = rng.random(scores.shape) < 0.4
    is_seen[0], is_seen[1, :6], is_seen[2] = False, False, True  # of none, not of all, of all
    weight = np.where(is_seen, np.exp(scores), 0)
    total = weight.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        want, want_lse = (
            np.where(total[:, None] > 0, weight @ values / total[:, None], 0),
            np.log(total),
        )
        parts = [slice(3 * d, 3 * d + 3) for d in range(SHARDS)]
        lse = np.stack([np.log(weight[:, p].sum(axis=1)) for p in parts])
        out = np.stack(
            [weight[:, p] @ values[p] / weight[:, p].sum(axis=1, keepdims=True) for p in parts]
        )
    assert np.isnan(out).any()  # a device without keys may leave anything

    def merge(out, lse):
        merged = merge_over_devices(
            out[0][None, :, None], lse[0][None, :, None], ("sequence",), scatter=scatter
        )
        return jax.tree.map(lambda x: x[0, :, 0], merged)

    got, got_lse = jax.jit(
        jax.shard_map(
            merge,
            mesh=mesh,
            in_specs=P("sequence"),
            out_specs=P("sequence") if scatter else P(),
            check_vma=False,
        )
    )(jnp.asarray(out, jnp.float32), jnp.asarray(lse, jnp.float32))
    assert_close(got, want, "float32")
    assert_close(got_lse, want_lse, "float32")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context": "tensor"}, "context='tensor' and heads='tensor' share mesh axis 'tensor'"),
        (
            {"context": "data"},
            r"context='data' and batch=\('data', 'fsdp'\) share mesh axis 'data'",
        ),
        (
            {"sequence": ("sequence", "stage"), "context": "stage"},
            "context='stage' and sequence=.* share mesh axis 'stage'",
        ),
        ({"context": "kontext"}, "mesh axis of context must be one of data, .*, got 'kontext'"),
    ],
)
def test_rules_that_collide_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        jax_mla.ShardingRules(**fields)


def test_a_cache_of_other_shards_is_refused(placed, tokens):
    cache = jax_mla.LatentCache.empty(CONFIG, B, 64, page_size=4)
    with pytest.raises(
        ValueError, match=r"num_shards of the cache must be 4 for context=.*, got 1"
    ):
        jax_mla.prefill(placed, CONFIG, tokens, cache, rules=RULES)
    cache = jax_mla.PagedLatentCache.empty(CONFIG, B * 16, 4, batch=B)
    message = r"page_table\[0, 1\] must be one of pages 16 to 23, .* entry 1 of sequence 0, got 1"
    with pytest.raises(ValueError, match=message):
        jax_mla.prefill(placed, CONFIG, tokens, cache, rules=RULES)
    cache = jax_mla.PagedLatentCache.empty(CONFIG, 60, 4, batch=B)
    with pytest.raises(
        ValueError, match="must be a multiple of 8, the devices that hold them, got 60"
    ):
        jax_mla.prefill(placed, CONFIG, tokens, cache, rules=RULES)


def test_positions_that_make_no_equal_stripes_are_refused(placed, mesh):
    tokens = np.zeros((B, 12), int)
    message = r"shape \(4, 12\) cannot be split in 8 stripes over 4 devices of mesh axis 'sequence'"
    with pytest.raises(ValueError, match=message):
        jax_mla.forward(placed, CONFIG, tokens, rules=RULES)
    message = "12 tokens of a row cannot be split in 8 stripes over 4 devices of mesh axis 'seq"
    with pytest.raises(ValueError, match=message):
        check_rows(*tokens.shape, recipe=Recipe(num_steps=1), mesh=mesh, rules=RULES)
