"""Every recipe of parallelism computes what one device does: logits, caches, tokens, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from numerics import assert_close

import jax_mla
from jax_mla.sharding import ExpertDispatch, layouts
from jax_mla.sharding.placement import partition_spec
from jax_mla.training import next_token_loss

CONFIG = dataclasses.replace(
    jax_mla.tiny(), initializer_range=0.1, num_attention_heads=4, num_hidden_layers=2
)
A2A = dataclasses.replace(layouts.tensor_parallel(), dispatch=ExpertDispatch("a2a"))
RECIPES = {
    "ddp": ({"data": 8}, layouts.ddp()),
    "zero3": ({"data": 4, "fsdp": 2}, layouts.zero3()),
    "tp": ({"tensor": 4}, layouts.tensor_parallel()),
    "dp_tp": ({"data": 2, "tensor": 4}, layouts.tensor_parallel()),
    "ep_dense": ({"data": 2, "expert": 4}, layouts.tensor_parallel()),
    "ep_a2a": ({"data": 2, "expert": 4}, A2A),
    "dp_tp_ep": ({"data": 2, "tensor": 2, "expert": 2}, A2A),
    "dp_attention_ep": ({"data": 2, "expert": 4}, layouts.dp_attention_ep()),
    "ep_8_ranks": ({"expert": 8}, layouts.dp_attention_ep()),
    "cp": ({"sequence": 8}, jax_mla.ShardingRules()),
    "dp_cp_tp": ({"data": 2, "sequence": 2, "tensor": 2}, jax_mla.ShardingRules()),
    "defaults": ({"fsdp": 2, "tensor": 2, "expert": 2}, None),
}
# These have all kinds of splits between them; the others are `slow`.
MAIN = ["zero3", "dp_tp_ep", "dp_attention_ep", "dp_cp_tp"]
B, T = 8, 32


def some(main):
    """Every recipe, all but the main ones marked slow."""
    return [r if r in main else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES]


@pytest.fixture(scope="module")
def params():
    return jax_mla.init(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (B, T))


@pytest.fixture(scope="module")
def logits(params, tokens):
    return np.asarray(jax_mla.forward(params, CONFIG, tokens))


def placed(recipe, params):
    sizes, recipe_rules = RECIPES[recipe]
    mesh = jax_mla.make_mesh(**sizes)
    shardings = jax_mla.param_shardings(CONFIG, mesh, recipe_rules)
    return jax.device_put(params, shardings), recipe_rules


@pytest.mark.parametrize("form", ["expanded", pytest.param("absorbed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", some([*MAIN, "ep_a2a"]))
def test_logits(recipe, form, params, tokens, logits):
    params, recipe_rules = placed(recipe, params)
    got = jax_mla.forward(params, CONFIG, tokens, form=form, rules=recipe_rules)
    assert_close(got, logits, "float32")


@pytest.mark.parametrize("recipe", some(["dp_cp_tp"]))
def test_packed_segments(recipe, params, tokens):
    segments = np.sort(np.random.default_rng(1).integers(0, 4, (B, T)))
    want = jax_mla.forward(params, CONFIG, tokens, segment_ids=segments)
    params, recipe_rules = placed(recipe, params)
    got = jax_mla.forward(params, CONFIG, tokens, segment_ids=segments, rules=recipe_rules)
    assert_close(got, want, "float32")


@pytest.mark.parametrize("kind", ["paged", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", some(["dp_attention_ep", "dp_cp_tp"]))
def test_chunked_prefill_and_decode(recipe, kind, params, tokens, logits):
    first = np.asarray([16, 9, 1, 12, 16, 3, 8, 5])
    if kind == "dense":
        cache = jax_mla.LatentCache.empty(CONFIG, B, 64, page_size=8)
    else:  # pages shuffled within each of the 8 shards that devices may hold
        order = np.random.default_rng(2).permuted(np.arange(B * 8).reshape(B, 8), axis=1)
        cache = jax_mla.PagedLatentCache.with_table(CONFIG, order, num_pages=B * 8, page_size=8)
    params, recipe_rules = placed(recipe, params)
    options = {"rules": recipe_rules}
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
    batch = partition_spec((recipe_rules or jax_mla.ShardingRules()), ("batch",))[0]
    expected = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, P(None, batch))
    assert cache.pages.sharding.is_equivalent_to(expected, 4)


@pytest.mark.parametrize("recipe", some(["dp_attention_ep"]))
def test_generated_tokens(recipe, params, tokens):
    lengths = np.asarray([16, 9, 1, 12, 16, 3, 8, 5])
    options = {"lengths": lengths, "max_new_tokens": 5, "eos_token_ids": ()}
    want = jax_mla.generate(params, CONFIG, tokens[:, :16], **options)
    params, recipe_rules = placed(recipe, params)
    got = jax_mla.generate(params, CONFIG, tokens[:, :16], rules=recipe_rules, **options)
    np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.parametrize("recipe", some(["zero3", "dp_tp_ep"]))
def test_loss_and_gradients(recipe, params, tokens):
    def value_and_grad(params, recipe_rules):
        def loss(params):
            return next_token_loss(params, CONFIG, tokens, rules=recipe_rules).loss

        return jax.jit(jax.value_and_grad(loss))(params)

    want, want_gradients = value_and_grad(params, None)
    placed_params, recipe_rules = placed(recipe, params)
    got, gradients = value_and_grad(placed_params, recipe_rules)
    assert_close(got, want, "float32")
    jax.tree.map(lambda g, w: assert_close(g, w, "float32"), gradients, want_gradients)


def test_a_pool_that_crosses_devices_is_refused(params, tokens):
    params, recipe_rules = placed("dp_tp", params)
    table = np.arange(B * 8).reshape(B, 8)[::-1]  # the last sequence uses the first device's pages
    cache = jax_mla.PagedLatentCache.with_table(CONFIG, table, num_pages=B * 8, page_size=8)
    with pytest.raises(
        ValueError, match=r"page_table\[0, 0\] must be one of pages 0 to 31, .* got 56"
    ):
        jax_mla.prefill(params, CONFIG, tokens, cache, rules=recipe_rules)


@pytest.mark.parametrize(
    ("recipe", "shape", "message"),
    [
        ("ddp", (6, 8), r"shape \(6, 8\) cannot be split over 8 devices of mesh axis 'data'"),
        ("cp", (1, 8), r"\(1, 8\) cannot be split in 16 stripes over 8 devices .* 'sequence'"),
    ],
)
def test_tokens_that_do_not_divide_are_refused(recipe, shape, message, params):
    params, recipe_rules = placed(recipe, params)
    with pytest.raises(ValueError, match=message):
        jax_mla.forward(params, CONFIG, np.zeros(shape, int), rules=recipe_rules)


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
