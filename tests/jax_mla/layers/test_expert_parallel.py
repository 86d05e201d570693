"""Experts over devices: what is sent where, what finds no room, and each dispatcher's result."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, NamedSharding
from kernel_tools import aot
from numerics import assert_close, normal

import jax_mla
from jax_mla.layers.linear import ExpertPool
from jax_mla.layers.moe.exchange import padded_slots, ragged_sizes, received_experts
from jax_mla.layers.moe.experts import apply_local
from jax_mla.layers.moe.on_mesh import apply_on_mesh, count_dropped
from jax_mla.sharding import ExpertDispatch, layouts
from jax_mla.sharding.axes import MESH_AXES
from jax_mla.sharding.placement import Placement, partition_spec
from jax_mla.training import next_token_loss

CONFIG = dataclasses.replace(jax_mla.tiny(), num_attention_heads=4, num_hidden_layers=3)
E, A, D, F = 16, 3, 8, 4
B, T = 8, 6
# Tokens split over the devices of the experts, not split, and one after the other.
LAYOUTS = {
    "split": ({"expert": 8}, layouts.dp_attention_ep()),
    "replicated": ({"data": 2, "expert": 4}, layouts.tensor_parallel()),
    "two_axes": (
        {"tensor": 2, "expert": 4},
        dataclasses.replace(layouts.dp_attention_ep(), expert=("expert", "tensor")),
    ),
    "width": ({"tensor": 2, "expert": 4}, layouts.tensor_parallel()),
}

# Devices that the experts are on; parts of the batch; devices that share each part's tokens.
SENDERS = {"split": (8, 8, 1), "replicated": (4, 2, 4), "two_axes": (8, 4, 2), "width": (4, 1, 4)}


def some(cases, main):
    """All but the main ones marked slow."""
    return [c if c in main else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def placement(layout, dispatch, capacity=None):
    sizes, base = LAYOUTS[layout]
    chosen = dataclasses.replace(base, dispatch=ExpertDispatch(dispatch, capacity))
    return Placement(abstract_mesh(**sizes), chosen)


def abstract_mesh(**sizes):
    """Of no devices, so that no platform is known that a dispatcher could not run on."""
    axis_types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return AbstractMesh(shape, MESH_AXES, axis_types=axis_types)


def layer(rng, shape=(B, T)):
    """Tokens, the weights of their experts, and the experts of one layer of a pool of two."""
    x, expert_weight = normal(rng, (*shape, D)), normal(rng, (*shape, A))
    return (
        x,
        expert_weight,
        tuple(ExpertPool(normal(rng, (2, E, *shape))) for shape in ((D, F), (D, F), (F, D))),
    )


def routings(rng, shape=(B, T)):
    """Random choices; the fewest experts, which all are on the first device; and on the last."""
    index = np.stack([rng.permutation(E)[:A] for _ in range(math.prod(shape))])
    few = (np.tile(first, (*shape, 1)) for first in (np.arange(A), E - 1 - np.arange(A)))
    return [index.reshape(*shape, A), *few]


def on_mesh(layout, arrays):
    """Replicated on the layout's mesh: shard_map takes of it what it needs."""
    mesh = jax_mla.make_mesh(**LAYOUTS[layout][0])
    return jax.device_put(arrays, NamedSharding(mesh, jax.sharding.PartitionSpec()))


@jax.jit
def unsharded(x, index, weight, weights):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, index, weight))
    return apply_local(*flat, weights, 1).reshape(x.shape)


def numpy_ragged_all_to_all(operands, num_rows, counts):
    """What JAX's documentation says of it, for all devices at once."""
    n = len(operands)
    sizes = [jax.tree.map(np.asarray, jax.jit(ragged_sizes)(counts, r)) for r in range(n)]
    results = [np.full((num_rows, operands[0].shape[1]), -1) for _ in range(n)]
    for source, mine in enumerate(sizes):
        for to in range(n):
            begin, size = mine.input_offsets[to], mine.send_sizes[to]
            assert sizes[to].recv_sizes[source] == size
            at = mine.output_offsets[to]
            results[to][at : at + size] = operands[source][begin : begin + size]
    return results


@given(st_numpy.arrays(np.int32, (3, 3, 2), elements=st.integers(0, 3)))
def test_ragged_rows_arrive_by_source_and_expert_and_return(counts):
    n, _, own = counts.shape
    room = 3 * counts.size  # for all rows on one device

    def rows(pairs):
        of_pairs = [
            (s, d, e, i) for s, d in pairs for e in range(own) for i in range(counts[s, d, e])
        ]
        return np.asarray(of_pairs, int).reshape(-1, 4)

    sent = [rows((s, d) for d in range(n)) for s in range(n)]
    received = numpy_ragged_all_to_all(sent, room, counts.sum(-1))
    for d in range(n):
        want = rows((s, d) for s in range(n))
        np.testing.assert_array_equal(received[d][: len(want)], want)
        assert (received[d][len(want) :] == -1).all()
        expert = jax.jit(received_experts, static_argnums=1)(counts[:, d], room)
        np.testing.assert_array_equal(expert, [*want[:, 2], *[own] * (room - len(want))])
    returned = numpy_ragged_all_to_all(received, room, counts.sum(-1).T)
    for s in range(n):
        np.testing.assert_array_equal(returned[s][: len(sent[s])], sent[s])


@given(
    st.lists(st.integers(-1, 7), min_size=12, max_size=12),
    st.integers(1, 13),
    st.sampled_from([1, 2]),
)
def test_the_first_rows_for_a_device_find_room(expert, room, own):
    num_devices, seen, want = 8 // own, {}, []
    for e in expert:
        place = seen[e // own] = seen.get(e // own, -1) + 1
        fits = e >= 0 and place < room
        want.append(e // own * room + place if fits else num_devices * room)
    slots = jax.jit(padded_slots, static_argnums=(1, 2))
    np.testing.assert_array_equal(slots(jnp.asarray(expert), own, num_devices, room), want)


def all_gathered(
    operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name, **_
):
    """ragged_all_to_all by a collective that XLA has on CPU."""
    del recv_sizes
    rank = jax.lax.axis_index(axis_name)
    operands, *sizes = (
        jax.lax.all_gather(a, axis_name)
        for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    for source, (begin, size, at) in enumerate(zip(*(s[:, rank] for s in sizes), strict=True)):
        i = jnp.arange(len(operand)) - begin
        is_sent = (i >= 0) & (i < size)
        output = output.at[jnp.where(is_sent, at + i, len(output))].set(
            operands[source], mode="drop"
        )
    return output


@pytest.fixture
def emulated():
    """A CPU that can run the primitive; how it is differentiated stays JAX's own."""
    twin = mlir.lower_fun(all_gathered, multiple_results=False)
    mlir.register_lowering(jax.lax.ragged_all_to_all_p, twin, platform="cpu")


def gradients(apply, x, index, weight, weights, dy):
    """Of sum(y * dy), and y."""

    def objective(x, weight, weights):
        y = apply(x, index, weight, weights)
        return jnp.sum(y * dy), y

    return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(x, weight, weights)


wanted_gradients = jax.jit(functools.partial(gradients, unsharded))


@pytest.mark.parametrize("layout", some(LAYOUTS, ["split", "two_axes"]))
@pytest.mark.parametrize("dispatch", some(["ragged", "a2a", "dense"], ["ragged"]))
def test_dispatchers_equal_the_unsharded_layer(dispatch, layout, rng, emulated):
    x, weight, weights = layer(rng)
    dy, place = normal(rng, x.shape), placement(layout, dispatch)
    sharded = jax.jit(functools.partial(gradients, lambda *a: apply_on_mesh(*a, 1, place)))
    for index in routings(rng):
        arrays = (x, jnp.asarray(index), weight, weights, dy)
        got, want = sharded(*on_mesh(layout, arrays)), wanted_gradients(*arrays)
        jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)


@pytest.mark.parametrize("layout", some(["replicated", "two_axes", "width"], ["replicated"]))
@pytest.mark.parametrize("dispatch", some(["ragged", "a2a"], ["a2a"]))
def test_tokens_that_cannot_be_shared_evenly(dispatch, layout, rng, emulated):
    """Five tokens among two or four devices: the last ones get less, or nothing."""
    shape = (SENDERS[layout][1], 5)
    x, weight, weights = layer(rng, shape)
    dy, place = normal(rng, x.shape), placement(layout, dispatch)
    sharded = jax.jit(functools.partial(gradients, lambda *a: apply_on_mesh(*a, 1, place)))
    for index in routings(rng, shape):
        arrays = (x, jnp.asarray(index), weight, weights, dy)
        got, want = sharded(*on_mesh(layout, arrays)), wanted_gradients(*arrays)
        jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)


def test_ragged_is_refused_on_a_cpu():
    message = r"'ragged' cannot run on platform 'cpu', .* use 'a2a' or 'dense'"
    recipe = dataclasses.replace(layouts.dp_attention_ep(), dispatch=ExpertDispatch("ragged"))
    mesh = jax_mla.make_mesh(expert=8)
    shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), CONFIG))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        jax_mla.param_shardings(CONFIG, mesh, layouts.dp_attention_ep()),
    )
    tokens = np.zeros((8, 4), np.int32)
    with pytest.raises(NotImplementedError, match=message):
        jax.jit(lambda p: jax_mla.forward(p, CONFIG, tokens, rules=recipe)).trace(placed)
    # Without experts on several devices there is nothing to send.
    mesh = jax_mla.make_mesh(data=8)
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        jax_mla.param_shardings(CONFIG, mesh, recipe),
    )
    jax.jit(lambda p: jax_mla.forward(p, CONFIG, tokens, rules=recipe)).trace(placed)


def lowered(mesh, function):
    """For NVIDIA GPUs, of the ragged dispatcher on a mesh of them."""
    recipe = dataclasses.replace(layouts.dp_attention_ep(), dispatch=ExpertDispatch("ragged"))
    shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), CONFIG))
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        jax_mla.param_shardings(CONFIG, mesh, recipe),
    )
    where = NamedSharding(mesh, partition_spec(recipe, ("batch", None)))
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=where)

    def loss(params, tokens):
        return next_token_loss(params, CONFIG, tokens, rules=recipe).loss

    traced = jax.jit(function(loss)).trace(placed, tokens)
    return traced.lower(lowering_platforms=("cuda",))


# There and back, and the same backwards; remat is off, so nothing is sent twice.
@pytest.mark.parametrize(
    ("function", "calls"), [(lambda f: f, 2), (jax.grad, 4)], ids=["loss", "grad"]
)
def test_ragged_lowers_for_gpus(function, calls):
    text = lowered(abstract_mesh(expert=8), function).as_text()
    assert text.count("stablehlo.custom_call @ragged_all_to_all") == calls


@pytest.mark.kernel_aot
def test_ragged_compiles_for_eight_h200s():
    mesh = jax_mla.make_mesh(expert=8, devices=aot.h200_devices(8))
    rows, _ = jax_mla.explain_collectives(lowered(mesh, jax.grad).compile())
    ragged = [row for row in rows if row.kind == "ragged-all-to-all"]
    assert {row.group_size for row in ragged} == {8}
    # Two MoE layers; what is received of M tokens has room for those of all devices.
    M, active, width = 8 * 4 // 8, CONFIG.num_experts_per_tok, CONFIG.hidden_size
    per_device = min(active, CONFIG.n_routed_experts // 8)
    assert {(row.shape, row.calls) for row in ragged} == {
        (f"f32[{8 * M * per_device},{width}]", 4),
        (f"f32[{M * active},{width}]", 4),
    }


def kept(index, layout, capacity):
    """Which choices find room, counted by hand: a device's tokens take it in their order."""
    num_devices, parts_of_batch, parts_of_tokens = SENDERS[layout]
    is_kept = np.zeros(index.shape, bool).reshape(parts_of_batch, -1, A)
    for choices, keeps in zip(index.reshape(parts_of_batch, -1, A), is_kept, strict=True):
        size = -(-len(choices) // parts_of_tokens)
        room = min(np.ceil(capacity * size * A / num_devices), size * min(A, E // num_devices))
        for begin in range(0, len(choices), size):
            sent = np.zeros(num_devices, int)
            for token in range(begin, min(begin + size, len(choices))):
                for a, expert in enumerate(choices[token]):
                    to = expert * num_devices // E
                    keeps[token, a] = sent[to] < room
                    sent[to] += 1
    return is_kept.reshape(index.shape)


@pytest.mark.parametrize("num_tokens", [T, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", some(LAYOUTS, ["split", "replicated"]))
def test_capacity_leaves_out_the_last_tokens_and_counts_them(layout, num_tokens, rng):
    """What is left out adds nothing to the results, nor to any gradient."""
    shape = (B if num_tokens == T else SENDERS[layout][1], num_tokens)
    x, weight, weights = layer(rng, shape)
    dy, capacity, dropped = normal(rng, x.shape), 0.75, []
    place = placement(layout, "a2a", capacity)

    @jax.jit
    def sharded(x, index, weight, weights, dy):
        found = gradients(lambda *a: apply_on_mesh(*a, 1, place), x, index, weight, weights, dy)
        return found, count_dropped(index, E, place)

    for index in routings(rng, shape):
        is_kept = kept(index, layout, capacity)
        arrays = (x, jnp.asarray(index), weight, weights, dy)
        got, num_dropped = sharded(*on_mesh(layout, arrays))
        assert num_dropped == (~is_kept).sum()
        dropped.append(num_dropped)
        want = wanted_gradients(x, jnp.where(is_kept, index, -1), weight, weights, dy)
        jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)
    assert min(dropped[1:]) > 0  # random choices of few tokens may all find room


@pytest.mark.parametrize("layout", some(LAYOUTS, ["split"]))
def test_capacity_for_all_changes_no_bit(layout, rng):
    x, weight, weights = layer(rng)
    index = jnp.asarray(routings(rng)[0])
    arrays = on_mesh(layout, (x, index, weight, weights))
    without, large = placement(layout, "a2a"), placement(layout, "a2a", 8.0)
    want = jax.jit(lambda *a: apply_on_mesh(*a, 1, without))(*arrays)
    got = jax.jit(lambda *a: apply_on_mesh(*a, 1, large))(*arrays)
    np.testing.assert_array_equal(got, want)
    assert jax.jit(lambda i: count_dropped(i, E, large))(arrays[1]) == 0


def dropped_of(index, capacity):
    """Of choices "B T A" with a row and an expert on each of eight devices."""
    num_tokens, active = index.shape[1:]
    counts = np.asarray([np.bincount(row.reshape(-1), minlength=8) for row in np.asarray(index)])
    return np.maximum(counts - np.ceil(capacity * num_tokens * active / 8), 0).sum()


def test_the_router_reports_dropped_choices(rng):
    place = placement("split", "a2a", 0.5)
    graphdef, state = nnx.split(jax_mla.MoE(CONFIG, rngs=nnx.Rngs(0), placement=place))
    x = normal(rng, (8, 16, CONFIG.hidden_size))
    route = jax.jit(lambda state, x: nnx.merge(graphdef, state).route(x))
    routing = route(*on_mesh("split", (state, x)))
    assert routing.num_dropped == dropped_of(routing.expert_index, 0.5) > 0


def test_nothing_is_dropped_where_nothing_is_sent():
    recipe = dataclasses.replace(layouts.dp_attention_ep(), dispatch=ExpertDispatch("a2a", 0.5))
    place = Placement(jax_mla.make_mesh(data=2).abstract_mesh, recipe)
    assert count_dropped(jnp.zeros((2, 3, 2), jnp.int32), E, place) == 0


@pytest.mark.slow
def test_forward_trace_and_loss_report_dropped_choices():
    recipe = dataclasses.replace(layouts.dp_attention_ep(), dispatch=ExpertDispatch("a2a", 0.5))
    mesh = jax_mla.make_mesh(expert=8)
    params = jax_mla.init(jax.random.key(0), CONFIG)
    params = jax.device_put(params, jax_mla.param_shardings(CONFIG, mesh, recipe))
    tokens = np.random.default_rng(0).integers(0, 256, (8, 16))
    trace = jax_mla.forward_trace(params, CONFIG, tokens, rules=recipe)
    dropped = [dropped_of(of_layer, 0.5) for of_layer in trace.expert_index]
    np.testing.assert_array_equal(trace.num_dropped, dropped)
    assert next_token_loss(params, CONFIG, tokens, rules=recipe).num_dropped == sum(dropped) > 0
    recipe = dataclasses.replace(recipe, dispatch=ExpertDispatch("a2a"))
    trace = functools.partial(jax_mla.forward_trace, config=CONFIG, tokens=tokens, rules=recipe)
    assert jax.eval_shape(lambda params: trace(params).num_dropped, params) is None


@pytest.mark.parametrize(
    ("capacity", "dispatch", "message"),
    [
        (0, "a2a", "must be a number above 0, got 0"),
        (-1.5, "a2a", "must be a number above 0, got -1.5"),
        (float("nan"), "a2a", "must be a number above 0, got nan"),
        (True, "a2a", "must be a number above 0, got True"),
        (1.5, "dense", "'a2a'.* got capacity=1.5 with method='dense'"),
        (1.5, "ragged", "'a2a'.* got capacity=1.5 with method='ragged'"),
        (None, "send", "method must be one of dense, a2a, ragged, got 'send'"),
    ],
)
def test_impossible_capacity_is_refused(capacity, dispatch, message):
    with pytest.raises(ValueError, match=message):
        ExpertDispatch(dispatch, capacity)


def test_a_dispatch_is_an_object():
    with pytest.raises(ValueError, match="dispatch must be an ExpertDispatch, got 'a2a'"):
        jax_mla.ShardingRules(dispatch="a2a")
