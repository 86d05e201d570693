"""Mixture of experts: the router on clear-cut scores, the experts with the routing held fixed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from numerics import assert_close, normal

import jax_mla
from jax_mla.layers.moe.router import Routing, route

CONFIG = dataclasses.replace(jax_mla.tiny(), initializer_range=0.2)
E, A, D = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok, CONFIG.hidden_size


def layer(config=CONFIG, seed=0):
    return jax_mla.MoE(config, rngs=nnx.Rngs(seed))


def written_out(moe, x, index, weight):
    """Every token through each of its experts, in float64."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(moe)))
    x = np.asarray(x, np.float64)

    def swiglu(x, p):
        gate, up = x @ p["gate_proj"]["weight"], x @ p["up_proj"]["weight"]
        return (gate / (1 + np.exp(-gate)) * up) @ p["down_proj"]["weight"]

    out = swiglu(x, w["shared_experts"])
    for at in np.ndindex(x.shape[:-1]):
        for e, share in zip(index[at], weight[at], strict=True):
            out[at] += share * swiglu(x[at], jax.tree.map(lambda leaf, e=e: leaf[e], w["experts"]))
    return out


def random_routing(rng, shape):
    index = np.stack([rng.permutation(E)[:A] for _ in range(np.prod(shape))]).reshape(*shape, A)
    return index.astype(np.int32), rng.uniform(0.1, 2.0, (*shape, A)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 67)], ids=str)
def test_experts_with_fixed_routing(shape, rng):
    moe = layer()
    x = normal(rng, (*shape, D))
    index, weight = random_routing(rng, shape)
    routing = Routing(jnp.asarray(index), jnp.asarray(weight))
    got = jax.jit(lambda x, r: moe(x, r))(x, routing)
    assert_close(got, written_out(moe, x, index, weight), "float32")


def test_all_tokens_on_one_expert(rng):
    """Nothing is dropped, however uneven the load."""
    moe = layer()
    x = normal(rng, (2, 40, D))
    index = np.broadcast_to(np.asarray([3, 5], np.int32), (2, 40, A))
    weight = np.ones((2, 40, A), np.float32)
    got = jax.jit(moe)(x, Routing(jnp.asarray(index), jnp.asarray(weight)))
    assert_close(got, written_out(moe, x, index, weight), "float32")


def test_padding_goes_to_no_expert(rng):
    """Real tokens keep their bits; of padding, NaN included, only its own output is left."""
    moe, x = layer(), normal(rng, (2, 9, D))
    valid = jnp.arange(9)[None] < jnp.asarray([[9], [4]])
    routing = jax.jit(moe.route)(x, valid)
    np.testing.assert_array_equal((routing.expert_index >= 0).all(-1), valid)
    np.testing.assert_array_equal((routing.expert_index < 0).all(-1), ~valid)
    poisoned = jnp.where(valid[..., None], x, jnp.nan)
    apply = jax.jit(lambda x, valid: moe(x, valid=valid))
    got, want = apply(poisoned, valid), jax.jit(moe)(x)
    np.testing.assert_array_equal(got[valid], want[valid])
    shared = moe.shared_experts(x)
    np.testing.assert_array_equal(apply(x, valid)[~valid], shared[~valid])
    given = Routing(*(jnp.asarray(a) for a in random_routing(rng, (2, 9))))
    np.testing.assert_array_equal(moe(x, given, valid=valid)[~valid], shared[~valid])


def test_gradients_with_fixed_routing(rng):
    graphdef, state = nnx.split(layer())
    x = normal(rng, (2, 9, D))
    index, weight = random_routing(rng, (2, 9))
    dy = normal(rng, x.shape)

    def loss(state, x, weight, grouped):
        moe = nnx.merge(graphdef, state)
        if grouped:
            return jnp.sum(moe(x, Routing(jnp.asarray(index), weight)) * dy)
        every = jnp.einsum("BTD,EDF->BTEF", x, moe.experts.gate_proj.weight[...])
        every = jax.nn.silu(every) * jnp.einsum("BTD,EDF->BTEF", x, moe.experts.up_proj.weight[...])
        every = jnp.einsum("BTEF,EFD->BTED", every, moe.experts.down_proj.weight[...])
        chosen = jnp.take_along_axis(every, jnp.asarray(index)[..., None], axis=2)
        y = (chosen * weight[..., None]).sum(axis=2) + moe.shared_experts(x)
        return jnp.sum(y * dy)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    grouped = grad(state, x, jnp.asarray(weight), True)
    dense = grad(state, x, jnp.asarray(weight), False)
    jax.tree.map(lambda a, b: assert_close(a, b, "float32"), grouped, dense)


def logits_of(scores, sigmoid):
    scores = np.asarray(scores, np.float32)
    return jnp.asarray(np.log(scores / (1 - scores)) if sigmoid else np.log(scores))


def chosen(routing):
    index, weight = np.asarray(routing.expert_index[0]), np.asarray(routing.expert_weight[0])
    return dict(zip(index.tolist(), weight.tolist(), strict=True))


def config(**fields):
    base = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 2,
            "routed_scaling_factor": 2.0}  # fmt: skip
    return dataclasses.replace(CONFIG, **(base | fields))


SCORES = [[0.30, 0.05, 0.20, 0.22, 0.13, 0.10]]  # sums to 1; groups (0 1) (2 3) (4 5)


def test_greedy_takes_the_best_scores():
    c = config(topk_method="greedy", scoring_func="softmax", norm_topk_prob=False)
    got = chosen(route(logits_of(SCORES, False), None, c))
    assert got == pytest.approx({0: 0.60, 3: 0.44}, rel=1e-5)


def test_group_limited_greedy_judges_a_group_by_its_best():
    c = config(topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False)
    scores = [[0.30, 0.05, 0.11, 0.12, 0.18, 0.24]]
    got = chosen(route(logits_of(scores, False), None, c))
    assert got == pytest.approx({0: 0.60, 5: 0.48}, rel=1e-5)
    got = chosen(route(logits_of(scores, False), None, dataclasses.replace(c, topk_group=1)))
    assert got == pytest.approx({0: 0.60, 1: 0.10}, rel=1e-5)


def test_noaux_tc_judges_a_group_by_its_two_best_and_weighs_without_bias():
    c = config(topk_group=1, norm_topk_prob=True)
    scores = [[0.90, 0.10, 0.60, 0.65, 0.30, 0.20]]
    bias = jnp.zeros(6)
    got = chosen(route(logits_of(scores, True), bias, c))
    assert got == pytest.approx({2: 2 * 0.60 / 1.25, 3: 2 * 0.65 / 1.25}, rel=1e-5)
    got = chosen(route(logits_of(scores, True), bias.at[1].set(0.5), c))
    assert got == pytest.approx({0: 2 * 0.9, 1: 2 * 0.1}, rel=1e-5)


def test_noaux_tc_prefers_negative_scores_of_kept_groups_to_dropped_groups():
    c = config(topk_group=1, norm_topk_prob=False)
    scores = [[0.5, 0.5, 0.4, 0.4, 0.3, 0.3]]
    got = chosen(route(logits_of(scores, True), jnp.full(6, -2.0), c))
    assert set(got) == {0, 1}


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4))
def test_routing_respects_its_groups(seed, topk_group, active):
    c = dataclasses.replace(
        CONFIG, n_routed_experts=16, n_group=4, topk_group=topk_group, num_experts_per_tok=active
    )
    rng = np.random.default_rng(seed)
    logits, bias = normal(rng, (7, 16)), normal(rng, (16,), scale=0.1)
    routing = route(logits, bias, c)
    index, weight = np.asarray(routing.expert_index), np.asarray(routing.expert_weight)
    for row in range(7):
        assert len(set(index[row])) == active
        assert len({e // 4 for e in index[row]}) <= topk_group
        assert weight[row].sum() == pytest.approx(c.routed_scaling_factor, rel=1e-4)


def test_router_multiplies_in_float32():
    """Two experts whose logits are one number in bfloat16: only float32 sees the better one."""
    c = dataclasses.replace(
        CONFIG, dtype="bfloat16", n_group=1, topk_group=1, num_experts_per_tok=1
    )
    x = np.full((1, 1, D), 2**-6, np.float32)
    x[0, 0, 0] = 2**-12
    gate = np.zeros((D, E), np.float32)
    gate[1:, 2] = gate[:, 5] = 1.0  # expert 5 also sees the first, tiny number
    logits = x[0, 0] @ gate
    assert logits[5] > logits[2] and jnp.bfloat16(logits[5]) == jnp.bfloat16(logits[2])
    graphdef, state = nnx.split(layer(c))
    state["gate"]["weight"][...] = jnp.asarray(gate, jnp.bfloat16)
    routing = nnx.merge(graphdef, state).route(jnp.asarray(x, jnp.bfloat16))
    assert routing.expert_index.item() == 5
