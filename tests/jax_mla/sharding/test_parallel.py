"""Every layout computes what one device does: logits, caches, tokens, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import MESH_LAYOUTS, slow_unless
from numerics import assert_close

import jax_mla
from jax_mla.sharding import layouts
from jax_mla.sharding.placement import partition_spec
from jax_mla.training import next_token_loss

CONFIG = dataclasses.replace(
    jax_mla.tiny(), initializer_range=0.1, num_attention_heads=4, num_hidden_layers=2
)
# ZeRO-1 and 2 are for training, and context parallelism has a file of its own.
NAMES = [name for name in MESH_LAYOUTS if name not in ("zero1", "zero2", "context")]
# These shard in all ways between them; the others are `slow`.
MAIN = ["zero3", "data_tensor_expert_a2a", "dp_attention_ep", "data_sequence_tensor"]
B, T = 8, 32


@pytest.fixture(scope="module")
def config():
    return CONFIG


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (B, T))


def placed(name, params):
    layout = MESH_LAYOUTS[name]
    return layout.place(params, CONFIG), layout.rules


@pytest.mark.parametrize("form", ["expanded", pytest.param("absorbed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", slow_unless([*MAIN, "data_expert_a2a"], NAMES))
def test_logits(layout, form, params, tokens, logits):
    params, rules = placed(layout, params)
    got = jax_mla.forward(params, CONFIG, tokens, form=form, rules=rules)
    assert_close(got, logits, "float32")


@pytest.mark.parametrize("layout", slow_unless(["data_sequence_tensor"], NAMES))
def test_packed_segments(layout, params, tokens):
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (B, T)))
    want = jax_mla.forward(params, CONFIG, tokens, segment_ids=segments)
    params, rules = placed(layout, params)
    got = jax_mla.forward(params, CONFIG, tokens, segment_ids=segments, rules=rules)
    assert_close(got, want, "float32")


@pytest.mark.parametrize("kind", ["paged", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", slow_unless(["dp_attention_ep", "data_sequence_tensor"], NAMES))
def test_chunked_prefill_and_decode(layout, kind, params, tokens, logits):
    first = np.asarray([16, 9, 1, 12, 16, 3, 8, 5])
    if kind == "dense":
        cache = jax_mla.LatentCache.empty(CONFIG, B, 64, page_size=8)
    else:  # pages shuffled within each of the 8 shards that devices may hold
        order = np.random.default_rng(2).permuted(np.arange(B * 8).reshape(B, 8), axis=1)
        cache = jax_mla.PagedLatentCache.with_table(CONFIG, order, num_pages=B * 8, page_size=8)
    params, rules = placed(layout, params)
    options = {"rules": rules}
    at = np.arange(B)
    got, cache = jax_mla.prefill(params, CONFIG, tokens[:, :16], cache, lengths=first, **options)
    assert_close(got, logits[at, first - 1], "float32")
    chunk = np.stack([np.roll(row, -n)[:16] for row, n in zip(tokens, first, strict=True)])
    second = np.asarray([8, 12, 16, 0, 2, 4, 9, 1])
    _, cache = jax_mla.prefill(params, CONFIG, chunk, cache, lengths=second, **options)
    total = first + second
    for _ in range(2):
        got, cache = jax_mla.decode_step(params, CONFIG, tokens[at, total], cache, **options)
        assert_close(got, logits[at, total], "float32")
        total = total + 1
    assert cache.lengths.tolist() == total.tolist()
    batch = partition_spec((rules or jax_mla.ShardingRules()), ("batch",))[0]
    expected = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, P(None, batch))
    assert cache.pages.sharding.is_equivalent_to(expected, 4)


@pytest.mark.parametrize("layout", slow_unless(["dp_attention_ep"], NAMES))
def test_generated_tokens(layout, params, tokens):
    lengths = np.asarray([16, 9, 1, 12, 16, 3, 8, 5])
    options = {"lengths": lengths, "max_new_tokens": 5, "eos_token_ids": ()}
    want = jax_mla.generate(params, CONFIG, tokens[:, :16], **options)
    params, rules = placed(layout, params)
    got = jax_mla.generate(params, CONFIG, tokens[:, :16], rules=rules, **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)


def loss_and_gradients(params, tokens, rules=None):
    def loss(params):
        return next_token_loss(params, CONFIG, tokens, rules=rules).loss

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def on_one_device(params, tokens):
    return loss_and_gradients(params, tokens)


@pytest.mark.parametrize("layout", slow_unless(["zero3", "data_tensor_expert_a2a"], NAMES))
def test_loss_and_gradients(layout, params, tokens, on_one_device):
    params, rules = placed(layout, params)
    got = loss_and_gradients(params, tokens, rules)
    jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, on_one_device)


def test_a_pool_that_crosses_devices_is_refused(params, tokens):
    params, rules = placed("data_tensor", params)
    table = np.arange(B * 8).reshape(B, 8)[::-1]  # the last sequence uses the first device's pages
    cache = jax_mla.PagedLatentCache.with_table(CONFIG, table, num_pages=B * 8, page_size=8)
    with pytest.raises(
        ValueError, match=r"page_table\[0, 0\] must be one of pages 0 to 31, .* got 56"
    ):
        jax_mla.prefill(params, CONFIG, tokens, cache, rules=rules)


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("ddp", (6, 8), r"shape \(6, 8\) cannot be split over 8 devices of mesh axis 'data'"),
        ("sequence", (1, 8), r"\(1, 8\) cannot be split in 16 stripes over 8 devices .*'sequence'"),
    ],
)
def test_tokens_that_do_not_divide_are_refused(layout, shape, message, params):
    params, rules = placed(layout, params)
    with pytest.raises(ValueError, match=message):
        jax_mla.forward(params, CONFIG, np.zeros(shape, int), rules=rules)


def test_rules_without_a_mesh_are_refused(params, tokens):
    with pytest.raises(ValueError, match="the parameters lie on none"):
        jax_mla.forward(params, CONFIG, tokens, rules=layouts.ddp())


def test_foreign_mesh_is_refused(params, tokens):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"mesh axes must be some of .* got 'x' among \('x',\)"):
        jax_mla.forward(params, CONFIG, tokens)


def test_inside_of_shard_map_a_device_is_alone(params, tokens, logits):
    mesh = jax_mla.make_mesh(data=8)
    forward = jax.jit(
        jax.shard_map(
            lambda params, tokens: jax_mla.forward(params, CONFIG, tokens),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
    )
    assert_close(forward(params, jnp.asarray(tokens)), logits, "float32")
