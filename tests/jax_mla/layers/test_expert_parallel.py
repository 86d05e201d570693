"""Experts over devices: every dispatcher's result, and what a capacity leaves out."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from kernel_tools import aot
from layouts import MESH_LAYOUTS, Layout, slow_unless
from numerics import assert_close, normal
from weights import random_params

import jax_mla
from jax_mla.layers.linear import ExpertPool
from jax_mla.layers.moe.experts import apply_local
from jax_mla.layers.moe.on_mesh import apply_on_mesh, count_dropped
from jax_mla.sharding import layouts
from jax_mla.sharding.placement import partition_spec
from jax_mla.training import next_token_loss

CONFIG = dataclasses.replace(jax_mla.tiny(), num_attention_heads=4, num_hidden_layers=3)

# Of the layers here that are experts alone.
NUM_EXPERTS, NUM_CHOSEN, MODEL_WIDTH, EXPERT_WIDTH = 16, 3, 8, 4
SHAPE = 8, 6  # sequences, tokens of each


@dataclasses.dataclass(frozen=True)
class ExpertLayout:
    """A layout, and who sends tokens to whom, worked out by hand.

    Attributes:
      expert_devices: how many hold different experts.
      batch_parts: how many parts the sequences are divided into.
      senders: devices that share the tokens of one part, one run of them each.
    """

    layout: Layout
    expert_devices: int
    batch_parts: int
    senders: int


LAYOUTS = {
    # Every device has sequences of its own.
    "split": ExpertLayout(MESH_LAYOUTS["dp_attention_ep_8"], 8, batch_parts=8, senders=1),
    # The devices of the experts have the same sequences.
    "replicated": ExpertLayout(MESH_LAYOUTS["data_expert"], 4, batch_parts=2, senders=4),
    # Experts on two axes, one of which divides the sequences.
    "two_axes": ExpertLayout(
        Layout(
            {"tensor": 2, "expert": 4},
            dataclasses.replace(layouts.dp_attention_ep(), expert=("expert", "tensor")),
        ),
        8, batch_parts=4, senders=2,
    ),
    # Each expert's width divided as well.
    "width": ExpertLayout(
        Layout({"tensor": 2, "expert": 4}, layouts.tensor_parallel()),
        4, batch_parts=1, senders=4,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of the experts of a layer, and of its backward pass: (x, index, weight, experts), dy."""

    x: jax.Array
    expert_weight: jax.Array
    experts: tuple[ExpertPool, ExpertPool, ExpertPool]
    dy: jax.Array

    def choosing(self, expert_index) -> tuple:
        return self.x, jnp.asarray(expert_index), self.expert_weight, self.experts, self.dy


def random_inputs(rng, shape=SHAPE) -> Inputs:
    """Experts are those of one layer of a pool of two."""
    up, down = (MODEL_WIDTH, EXPERT_WIDTH), (EXPERT_WIDTH, MODEL_WIDTH)
    return Inputs(
        normal(rng, (*shape, MODEL_WIDTH)),
        normal(rng, (*shape, NUM_CHOSEN)),
        tuple(ExpertPool(normal(rng, (2, NUM_EXPERTS, *size))) for size in (up, up, down)),
        normal(rng, (*shape, MODEL_WIDTH)),
    )


def routings(rng, shape=SHAPE):
    """Random choices; the fewest experts, all on the first device; the same on the last one."""
    of_token = [rng.permutation(NUM_EXPERTS)[:NUM_CHOSEN] for _ in range(math.prod(shape))]
    first = np.arange(NUM_CHOSEN)
    few = (np.tile(experts, (*shape, 1)) for experts in (first, NUM_EXPERTS - 1 - first))
    return [np.reshape(of_token, (*shape, NUM_CHOSEN)), *few]


@jax.jit
def unsharded(x, index, weight, experts):
    flat = (a.reshape(-1, a.shape[-1]) for a in (x, index, weight))
    return apply_local(*flat, experts, 1).reshape(x.shape)


def results_and_gradients(apply, x, index, weight, experts, dy):
    """y, and the gradients of sum(y * dy)."""

    def objective(x, weight, experts):
        y = apply(x, index, weight, experts)
        return jnp.sum(y * dy), y

    return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(x, weight, experts)


of_unsharded = jax.jit(functools.partial(results_and_gradients, unsharded))


def of_sharded(layout: Layout):
    place = layout.placement()
    return jax.jit(functools.partial(results_and_gradients, lambda *a: apply_on_mesh(*a, 1, place)))


def ragged_by_all_gather(
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


@pytest.fixture(scope="module")
def ragged_runs_on_cpu():
    """XLA cannot run a ragged all-to-all on CPUs, and JAX can be told how to lower one there.

    So everything above XLA is tested: what is sent, and how JAX differentiates it.
    """
    lowering = mlir.lower_fun(ragged_by_all_gather, multiple_results=False)
    mlir.register_lowering(jax.lax.ragged_all_to_all_p, lowering, platform="cpu")


@pytest.mark.usefixtures("ragged_runs_on_cpu")
@pytest.mark.parametrize("name", slow_unless(["split", "two_axes"], LAYOUTS))
@pytest.mark.parametrize("method", slow_unless(["ragged"], ["ragged", "a2a", "dense"]))
def test_dispatchers_equal_the_unsharded_layer(method, name, rng):
    layout, inputs = LAYOUTS[name].layout.dispatching(method), random_inputs(rng)
    sharded = of_sharded(layout)
    for index in routings(rng):
        arrays = inputs.choosing(index)
        got, want = sharded(*layout.replicate(arrays)), of_unsharded(*arrays)
        jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)


@pytest.mark.usefixtures("ragged_runs_on_cpu")
@pytest.mark.parametrize("name", slow_unless(["replicated"], ["replicated", "two_axes", "width"]))
@pytest.mark.parametrize("method", slow_unless(["a2a"], ["ragged", "a2a"]))
def test_tokens_that_cannot_be_shared_evenly(method, name, rng):
    """Five tokens among two or four devices: the last ones get less, or nothing."""
    layout, shape = LAYOUTS[name].layout.dispatching(method), (LAYOUTS[name].batch_parts, 5)
    inputs, sharded = random_inputs(rng, shape), of_sharded(layout)
    for index in routings(rng, shape):
        arrays = inputs.choosing(index)
        got, want = sharded(*layout.replicate(arrays)), of_unsharded(*arrays)
        jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)


def test_ragged_is_refused_on_a_cpu():
    message = r"'ragged' cannot run on platform 'cpu', .* use 'a2a' or 'dense'"
    on_experts = MESH_LAYOUTS["dp_attention_ep_8"].dispatching("ragged")
    tokens = np.zeros((8, 4), np.int32)
    forward = jax.jit(lambda p: jax_mla.forward(p, CONFIG, tokens, rules=on_experts.rules))
    with pytest.raises(NotImplementedError, match=message):
        forward.trace(on_experts.abstract_params(CONFIG))
    # Without experts on several devices there is nothing to send.
    forward.trace(Layout({"data": 8}, on_experts.rules).abstract_params(CONFIG))


def lowered_for_gpus(mesh, transformation):
    """The loss, or its gradient, with the ragged dispatcher."""
    layout = MESH_LAYOUTS["dp_attention_ep_8"].dispatching("ragged")
    where = NamedSharding(mesh, partition_spec(layout.rules, ("batch", None)))
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=where)

    def loss(params, tokens):
        return next_token_loss(params, CONFIG, tokens, rules=layout.rules).loss

    traced = jax.jit(transformation(loss)).trace(layout.abstract_params(CONFIG, mesh), tokens)
    return traced.lower(lowering_platforms=("cuda",))


# There and back, and the same backwards; remat is off, so nothing is sent twice.
@pytest.mark.parametrize(
    ("transformation", "calls"), [(lambda f: f, 2), (jax.grad, 4)], ids=["loss", "grad"]
)
def test_ragged_lowers_for_gpus(transformation, calls):
    mesh = MESH_LAYOUTS["dp_attention_ep_8"].abstract_mesh()
    text = lowered_for_gpus(mesh, transformation).as_text()
    assert text.count("stablehlo.custom_call @ragged_all_to_all") == calls


@pytest.mark.kernel_aot
def test_ragged_compiles_for_eight_h200s():
    mesh = MESH_LAYOUTS["dp_attention_ep_8"].mesh(aot.h200_devices(8))
    rows, _ = jax_mla.explain_collectives(lowered_for_gpus(mesh, jax.grad).compile())
    ragged = [row for row in rows if row.kind == "ragged-all-to-all"]
    assert {row.group_size for row in ragged} == {8}
    # Two MoE layers; what a device receives has room for the rows of all devices.
    own_tokens, chosen, width = 8 * 4 // 8, CONFIG.num_experts_per_tok, CONFIG.hidden_size
    received = 8 * own_tokens * min(chosen, CONFIG.n_routed_experts // 8)
    assert {(row.shape, row.calls) for row in ragged} == {
        (f"f32[{received},{width}]", 4),
        (f"f32[{own_tokens * chosen},{width}]", 4),
    }


def first_that_fit(choices, room, num_devices):
    """Of the choices "tokens NUM_CHOSEN" of one device, the first `room` for every other device."""
    fits, num_sent = np.zeros(choices.shape, bool), collections.Counter()
    for at in np.ndindex(choices.shape):
        device = choices[at] * num_devices // NUM_EXPERTS
        fits[at] = num_sent[device] < room
        num_sent[device] += 1
    return fits


def find_room(index, layout: ExpertLayout, capacity):
    """Which choices are not dropped, counted by hand: tokens take up room in their order."""
    parts = index.reshape(layout.batch_parts, -1, NUM_CHOSEN)
    num_tokens = math.ceil(parts.shape[1] / layout.senders)  # of one sender; the last has fewer
    per_device = NUM_EXPERTS // layout.expert_devices
    room = min(
        math.ceil(capacity * num_tokens * NUM_CHOSEN / layout.expert_devices),
        num_tokens * min(NUM_CHOSEN, per_device),
    )
    runs = [
        run
        for part in parts
        for run in np.split(part, range(num_tokens, parts.shape[1], num_tokens))
    ]
    fits = [first_that_fit(run, room, layout.expert_devices) for run in runs]
    return np.concatenate(fits).reshape(index.shape)


@pytest.mark.parametrize("num_tokens", [SHAPE[1], pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_unless(["split", "replicated"], LAYOUTS))
def test_capacity_leaves_out_the_last_tokens_and_counts_them(name, num_tokens, rng):
    """What is left out adds nothing to the results, nor to any gradient."""
    of_experts, capacity, dropped = LAYOUTS[name], 0.75, []
    layout = of_experts.layout.dispatching("a2a", capacity)
    shape = (SHAPE[0] if num_tokens == SHAPE[1] else of_experts.batch_parts, num_tokens)
    inputs, place = random_inputs(rng, shape), layout.placement()

    @jax.jit
    def sharded(*arrays):
        found = results_and_gradients(lambda *a: apply_on_mesh(*a, 1, place), *arrays)
        return found, count_dropped(arrays[1], NUM_EXPERTS, place)

    for index in routings(rng, shape):
        fits = find_room(index, of_experts, capacity)
        got, num_dropped = sharded(*layout.replicate(inputs.choosing(index)))
        assert num_dropped == (~fits).sum()
        dropped.append(num_dropped)
        want = of_unsharded(*inputs.choosing(np.where(fits, index, -1)))
        jax.tree.map(lambda g, w: assert_close(g, w, "float32"), got, want)
    assert min(dropped[1:]) > 0  # random choices of few tokens may all find room


@pytest.mark.parametrize("name", slow_unless(["split"], LAYOUTS))
def test_capacity_for_all_changes_no_bit(name, rng):
    without = LAYOUTS[name].layout.dispatching("a2a")
    *arrays, _ = without.replicate(random_inputs(rng).choosing(routings(rng)[0]))
    places = without.placement(), without.dispatching("a2a", capacity=8.0).placement()
    want, got = (jax.jit(lambda *a, at=at: apply_on_mesh(*a, 1, at))(*arrays) for at in places)
    np.testing.assert_array_equal(got, want)
    assert jax.jit(lambda i: count_dropped(i, NUM_EXPERTS, places[1]))(arrays[1]) == 0


def dropped_of(index, capacity):
    """Of choices "B T A" with a row and an expert on each of eight devices."""
    num_tokens, chosen = index.shape[1:]
    counts = np.asarray([np.bincount(row.reshape(-1), minlength=8) for row in np.asarray(index)])
    return np.maximum(counts - np.ceil(capacity * num_tokens * chosen / 8), 0).sum()


def test_the_router_reports_dropped_choices(rng):
    layout = MESH_LAYOUTS["dp_attention_ep_8"].dispatching("a2a", 0.5)
    moe = jax_mla.MoE(CONFIG, rngs=nnx.Rngs(0), placement=layout.placement())
    graphdef, state = nnx.split(moe)
    x = normal(rng, (8, 16, CONFIG.hidden_size))
    route = jax.jit(lambda state, x: nnx.merge(graphdef, state).route(x))
    routing = route(*layout.replicate((state, x)))
    assert routing.num_dropped == dropped_of(routing.expert_index, 0.5) > 0


def test_nothing_is_dropped_where_nothing_is_sent():
    place = Layout({"data": 2}, layouts.dp_attention_ep()).dispatching("a2a", 0.5).placement()
    assert count_dropped(jnp.zeros((2, 3, 2), jnp.int32), NUM_EXPERTS, place) == 0


@pytest.mark.slow
def test_forward_trace_and_loss_report_dropped_choices():
    layout = MESH_LAYOUTS["dp_attention_ep_8"].dispatching("a2a", 0.5)
    params = layout.place(random_params(CONFIG), CONFIG)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 16))
    trace = jax_mla.forward_trace(params, CONFIG, tokens, rules=layout.rules)
    dropped = [dropped_of(of_layer, 0.5) for of_layer in trace.expert_index]
    np.testing.assert_array_equal(trace.num_dropped, dropped)
    loss = next_token_loss(params, CONFIG, tokens, rules=layout.rules)
    assert loss.num_dropped == sum(dropped) > 0
    rules = layout.dispatching("a2a").rules
    trace = functools.partial(jax_mla.forward_trace, config=CONFIG, tokens=tokens, rules=rules)
    assert jax.eval_shape(lambda params: trace(params).num_dropped, params) is None
