"""One training step: parts of a batch, numbers formats, what moves and what does not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.training.dynamic_scale import DynamicScale
from kernel_tools.aot import lower_for_cuda
from numerics import assert_close
from weights import random_params

import jax_mla
from jax_mla.training import Batch, Precision, Recipe, init_state, place_batch, train_step
from jax_mla.training.step import next_loss_scale
from pallas_kernels import hardware

FLOAT32 = Precision(compute="float32")
RECIPE = Recipe(num_steps=100, warmup_steps=0, learning_rate=3e-3, precision=FLOAT32)


def start(config, recipe):
    params = random_params(config)
    return init_state(jax.random.key(0), config, recipe=recipe, params=params)


def same_bits(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def dtypes(tree):
    return [x.dtype.name for x in jax.tree.leaves(tree)]


def moments(state):
    """Adam's first moments after one step: the gradients, clipped, times 1 - b1."""
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {
        jax.tree_util.keystr(path): x for path, x in leaves if ".mu" in jax.tree_util.keystr(path)
    }


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fused"])
def test_recipe_chooses_the_gradient_kernels(config, monkeypatch, deterministic):
    monkeypatch.setattr(hardware, "missing_gpu", lambda *_: None)
    monkeypatch.setattr(hardware, "num_sms", lambda: 1)
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
    config = dataclasses.replace(config, first_k_dense_replace=1, **sizes)
    recipe = Recipe(num_steps=1, deterministic=deterministic)
    state = jax.eval_shape(lambda: start(config, recipe))
    step = functools.partial(train_step, config=config, recipe=recipe)
    batch = Batch(jax.ShapeDtypeStruct((1, 128), jnp.int32))
    text = lower_for_cuda(lambda state, batch: step(state, batch=batch), state, batch)
    assert "flash_attention_forward" in text
    assert ("flash_attention_dq" in text) == ("flash_attention_dk_dv" in text) == deterministic


def test_micro_batches_equal_the_whole_batch(config, tokens):
    """With all three losses, and rows that count different numbers of tokens."""
    mask = jnp.asarray(np.arange(14)[None] < np.array([14, 5, 2, 9])[:, None])
    batch, whole = Batch(jnp.asarray(tokens), loss_mask=mask), RECIPE
    whole = dataclasses.replace(RECIPE, z_loss=0.1, balance_loss=0.1)
    results = [
        train_step(start(config, recipe), config, batch, recipe=recipe)
        for recipe in (whole, dataclasses.replace(whole, num_micro_batches=4))
    ]
    (one, one_metrics), (four, four_metrics) = results
    for name in ("loss", "num_tokens", "z_loss", "balance_loss", "grad_norm", "load"):
        assert_close(getattr(four_metrics, name), getattr(one_metrics, name), "float32")
    assert moments(one).keys() == moments(four).keys()
    assert len(moments(one)) == len(jax.tree.leaves(one.params)) - 1  # all but the router's bias
    for name, moment in moments(one).items():
        assert_close(moments(four)[name], moment)
    bias = [s.params["moe_layers"]["mlp"]["e_score_correction_bias"] for s in (one, four)]
    assert bias[0].any() and (bias[0] == bias[1]).all()


def test_the_same_seed_gives_the_same_bits_and_the_old_state_is_gone(config, tokens):
    states = []
    for _ in range(2):
        state = init_state(jax.random.key(0), config, recipe=RECIPE)
        first = jax.tree.map(np.array, state.params)
        for _ in range(3):
            old = state
            state, _ = train_step(old, config, Batch(jnp.asarray(tokens)), recipe=RECIPE)
            assert old.params["lm_head"]["weight"].is_deleted()
        states.append(state)
    assert same_bits(*states) and states[0].step == 3
    other = init_state(jax.random.key(1), config, recipe=RECIPE)
    assert not same_bits(other.params, first)


def test_the_routers_bias_moves_by_its_rate_alone(config, tokens):
    batch = Batch(jnp.asarray(tokens))
    state, metrics = train_step(start(config, RECIPE), config, batch, recipe=RECIPE)
    off = np.sign(metrics.load.mean(axis=-1, keepdims=True) - metrics.load)
    bias = state.params["moe_layers"]["mlp"]["e_score_correction_bias"]
    assert (bias == np.float32(RECIPE.router_bias_rate) * off).all() and bias.any()
    assert metrics.load.sum() == tokens.size * 2


def test_an_overflow_changes_only_the_scale_and_is_counted(config, tokens):
    recipe = dataclasses.replace(RECIPE, precision=Precision(compute="float16"))
    batch, state = Batch(jnp.asarray(tokens)), start(config, recipe)
    before = jax.tree.map(np.array, (state.params, state.opt_state))
    state = dataclasses.replace(state, loss_scale=state.loss_scale.replace(scale=jnp.float32(2e9)))
    state, metrics = train_step(state, config, batch, recipe=recipe)
    assert metrics.is_skipped and np.isfinite(metrics.loss)
    assert same_bits(before, (state.params, state.opt_state))
    assert (state.step, state.num_skipped, state.loss_scale.scale) == (1, 1, 1e9)
    assert (metrics.num_skipped, metrics.loss_scale) == (1, 2e9)
    state = dataclasses.replace(state, loss_scale=state.loss_scale.replace(scale=jnp.float32(1024)))
    state, metrics = train_step(state, config, batch, recipe=recipe)
    assert not metrics.is_skipped and not same_bits(before[0], state.params)
    assert (state.step, state.num_skipped, state.loss_scale.scale) == (2, 1, 1024)
    assert (metrics.num_skipped, metrics.loss_scale) == (1, 1024)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    _, wanted = train_step(start(config, RECIPE), config, batch, recipe=RECIPE)
    assert_close(metrics.grad_norm, wanted.grad_norm, "bfloat16")  # the scale is divided out


@pytest.mark.parametrize("compute", ["float32", "float16"])
def test_a_state_keeps_its_dtypes_and_is_compiled_for_once(config, tokens, compute):
    """Weights and moments stay bfloat16, whatever gradients and their scale are."""
    config = dataclasses.replace(config, first_k_dense_replace=1)
    precision = Precision(param="bfloat16", compute=compute)
    recipe = dataclasses.replace(RECIPE, precision=precision)
    state, batch = start(config, recipe), Batch(jnp.asarray(tokens))
    wanted, before = dtypes(state), train_step._cache_size()
    for _ in range(2):
        state, metrics = train_step(state, config, batch, recipe=recipe)
        assert dtypes(state) == wanted and metrics.grad_norm.dtype == "float32"
    assert train_step._cache_size() == before + 1


@pytest.mark.parametrize("is_finite", [True, False], ids=["finite", "overflow"])
@pytest.mark.parametrize("fin_steps", [0, 7])
def test_the_scale_follows_flaxs_rule(is_finite, fin_steps):
    scale = DynamicScale(growth_interval=7, fin_steps=jnp.int32(fin_steps), scale=jnp.float32(8))
    got = next_loss_scale(scale, jnp.array(is_finite))
    want, *_ = scale.value_and_grad(lambda x: x * (1.0 if is_finite else jnp.nan))(1.0)
    assert (got.scale, got.fin_steps) == (want.scale, want.fin_steps)
    assert got.scale == ((16 if fin_steps == 7 else 8) if is_finite else 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"precision": Precision(compute="float16")}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "muon", "schedule": "wsd", "remat": "dots", "num_micro_batches": 2},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bfloat16", "float16", "muon"],
)
def test_every_recipe_learns(config, options):
    text = np.frombuffer(b"in the beginning was the word. " * 20, np.uint8)
    batch = Batch(jnp.asarray(text[:128].reshape(4, 32).astype(np.int32)))
    recipe = Recipe(num_steps=60, learning_rate=1e-2, **options)
    state, losses = start(config, recipe), []
    for _ in range(60):
        state, metrics = train_step(state, config, batch, recipe=recipe)
        losses.append(float(metrics.loss))
    assert losses[0] > 5 and losses[-1] < 2


def test_rows_that_cannot_be_divided_are_refused(config, tokens):
    recipe = dataclasses.replace(RECIPE, num_micro_batches=3)
    state = jax.eval_shape(lambda: start(config, recipe))
    with pytest.raises(ValueError, match="4 rows cannot be divided into 3 micro-batches"):
        train_step(state, config, Batch(jnp.asarray(tokens)), recipe=recipe)


NOT_FOR_A_LOSS = {
    "segments": (
        Batch(np.zeros((4, 8), np.int32), np.zeros((4, 7), np.int32)),
        r"segment_ids must have the shape of tokens, \(4, 8\), got \(4, 7\)",
    ),
    "mask-shape": (
        Batch(np.zeros((4, 8), np.int32), loss_mask=np.ones((1, 8), bool)),
        r"loss_mask must have the shape of tokens, \(4, 8\), got \(1, 8\)",
    ),
    "mask-dtype": (
        Batch(np.zeros((4, 8), np.int32), loss_mask=np.ones((4, 8), np.int32)),
        "loss_mask must be bool, got dtype int32",
    ),
    "one-token": (Batch(np.zeros((4, 1), np.int32)), r"at least 2 per row for a loss, .* \(4, 1\)"),
    "floats": (Batch(np.zeros((4, 8))), "tokens must be integers, got dtype float"),
}


@pytest.mark.parametrize(("batch", "message"), NOT_FOR_A_LOSS.values(), ids=NOT_FOR_A_LOSS)
def test_batches_that_are_none_are_refused(config, batch, message):
    with pytest.raises(ValueError, match=message):
        place_batch(batch, None, config=config)
    state = jax.eval_shape(lambda: start(config, RECIPE))
    with pytest.raises(ValueError, match=message):
        train_step(state, config, batch, recipe=RECIPE)


def test_token_ids_are_looked_at_where_they_are_placed(config, tokens):
    outside = tokens.copy()
    outside[1, 2] = 999
    with pytest.raises(
        ValueError, match="token ids must be from 0 to 319, the vocabulary, got 999"
    ):
        place_batch(Batch(outside), None, config=config)


def test_a_mesh_with_stages_is_refused(config, tokens):
    mesh, message = jax_mla.make_mesh(stage=2), "stage=1, got stage=2, .* pipeline_train_step"
    state = jax.eval_shape(lambda: start(config, RECIPE))
    with pytest.raises(ValueError, match=message):
        train_step(state, config, Batch(tokens), recipe=RECIPE, mesh=mesh)


def test_weights_to_start_from_are_copied(config, params, tokens):
    state = init_state(jax.random.key(0), config, recipe=RECIPE, params=params)
    assert same_bits(state.params, params)
    train_step(state, config, place_batch(Batch(tokens), None), recipe=RECIPE)
    assert not params["lm_head"]["weight"].is_deleted()
