"""Everything the model computes equals the torch reference, family by family."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from golden_sets import GOLDEN, NAMES, read_golden, sets_with

import jax_mla
from jax_mla.training import next_token_loss

FORMS = ["expanded", "absorbed"]
KINDS = ["dense", "paged"]
BOUND = 5e-5


@functools.cache
def load(name):
    params, config = jax_mla.load(GOLDEN / name, dtype="float32")
    return params, config, read_golden(name)


def assert_near(got, want):
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=BOUND)


@pytest.mark.parametrize("name", NAMES)
def test_forward(name):
    """Logits, the output of every layer, and the experts that it chose, in expanded form."""
    params, config, golden = load(name)
    trace = jax_mla.forward_trace(params, config, golden["input_ids"], form="expanded")
    assert_near(trace.logits, golden["logits"])
    if "hidden_states" in golden:
        want = golden["hidden_states"]
        np.testing.assert_allclose(trace.hidden_states, want, rtol=1e-5, atol=BOUND)
    layers = [key for key in golden if key.startswith("router_idx_")]
    assert len(layers) == (0 if name == "v3_fp8" else config.num_moe_layers)
    for key in layers:
        layer = int(key.removeprefix("router_idx_"))
        at = layer - config.num_dense_layers
        index, weight = (np.asarray(x)[at] for x in (trace.expert_index, trace.expert_weight))
        index, weight = (x.reshape(-1, config.num_experts_per_tok) for x in (index, weight))
        order = index.argsort(-1)
        np.testing.assert_array_equal(np.take_along_axis(index, order, -1), golden[key])
        weight = np.take_along_axis(weight, order, -1)
        np.testing.assert_allclose(weight, golden[f"router_w_{layer}"], rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_absorbed_form(name):
    params, config, golden = load(name)
    logits = jax_mla.forward(params, config, golden["input_ids"], form="absorbed")
    assert_near(logits, golden["logits"])


@pytest.mark.parametrize("name", sets_with("gen_ids"))
def test_greedy_tokens(name):
    params, config, golden = load(name)
    prompt = golden["input_ids"]
    want = golden["gen_ids"][:, prompt.shape[1] :]
    steps = want.shape[1]
    out = jax_mla.generate(params, config, prompt, max_new_tokens=steps, eos_token_ids=())
    np.testing.assert_array_equal(out.tokens, want)
    np.testing.assert_array_equal(out.lengths, [steps] * len(want))


def empty_cache(kind, config, batch, tokens):
    if kind == "dense":
        return jax_mla.LatentCache.empty(config, batch, tokens)
    pages = 3 + batch * -(-tokens // 8)
    table = np.random.default_rng(0).permutation(pages)[3:].reshape(batch, -1)
    return jax_mla.PagedLatentCache.with_table(config, table, num_pages=pages, page_size=8)


# Every set once; of a few sets each cache in each form, most of them `slow`, because
# test_functional compares all of them with `forward`, which is compared with the sets above.
CACHED_STEPS = [(name, "paged", None) for name in sets_with("step_logits")]
CACHED_STEPS += [("v3", "dense", "absorbed"), ("v3", "paged", "expanded")]
SLOW_CACHED_STEPS = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(("v3", "v2_yarn", "minicpm3"), KINDS, FORMS)
    if case not in CACHED_STEPS
]


@pytest.mark.parametrize(("name", "kind", "form"), CACHED_STEPS + SLOW_CACHED_STEPS)
def test_cached_steps(name, kind, form):
    """A prompt in two chunks, then one token at a time, against the reference's cached steps."""
    params, config, golden = load(name)
    prompt, ids = golden["input_ids"], golden["gen_ids"]
    cache = empty_cache(kind, config, len(ids), ids.shape[1])
    _, cache = jax_mla.prefill(params, config, prompt[:, :10], cache, form=form)
    logits, cache = jax_mla.prefill(params, config, prompt[:, 10:], cache, form=form)
    assert_near(logits, golden["step_logits"][:, 0])
    for step in range(1, golden["step_logits"].shape[1]):
        token = ids[:, prompt.shape[1] + step - 1]
        logits, cache = jax_mla.decode_step(params, config, token, cache)
        assert_near(logits, golden["step_logits"][:, step])
    np.testing.assert_array_equal(cache.lengths, prompt.shape[1] + step)


@pytest.mark.parametrize("name", ["v3_yarn_mscale", "v2_lite", "minicpm3_longrope"])
def test_left_padding_as_segments(name):
    params, config, golden = load(name)
    mask = golden["pad_mask"].astype(bool)
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    logits = jax_mla.forward(
        params, config, golden["pad_ids"], positions=positions, segment_ids=mask.astype(np.int32)
    )
    assert_near(np.asarray(logits)[mask], golden["pad_logits"][mask])


# Where a golden gradient lives in our tree, and how its [out, in] becomes our shape.
PLACES = {
    "model.embed_tokens.weight": lambda g, c: g["embed_tokens"]["weight"],
    "mlp.gate.weight": lambda g, c: g["mlp"]["gate"]["weight"].T,
    "mlp.down_proj.weight": lambda g, c: g["mlp"]["down_proj"]["weight"].T,
    "mlp.shared_experts.down_proj.weight": lambda g, c: (
        g["mlp"]["shared_experts"]["down_proj"]["weight"].T
    ),
    "self_attn.q_proj.weight": lambda g, c: flat(g["self_attn"]["q_proj"]["weight"]).T,
    "self_attn.q_a_layernorm.weight": lambda g, c: g["self_attn"]["q_a_layernorm"]["weight"],
    "self_attn.kv_a_proj_with_mqa.weight": lambda g, c: (
        g["self_attn"]["kv_a_proj_with_mqa"]["weight"].T
    ),
    "self_attn.kv_a_proj_with_mqa.bias": lambda g, c: g["self_attn"]["kv_a_proj_with_mqa"]["bias"],
    "self_attn.kv_a_layernorm.weight": lambda g, c: g["self_attn"]["kv_a_layernorm"]["weight"],
    "self_attn.kv_b_proj.weight": lambda g, c: np.concatenate(
        [g["self_attn"]["k_b_proj"]["weight"], g["self_attn"]["v_b_proj"]["weight"]], axis=1
    ).reshape(-1, c.kv_lora_rank),
    "self_attn.o_proj.bias": lambda g, c: g["self_attn"]["o_proj"]["bias"],
}


def flat(weight):
    return weight.reshape(weight.shape[0], -1)


def layer_of(gradients, config, layer):
    is_dense = layer < config.num_dense_layers
    stack = gradients["dense_layers" if is_dense else "moe_layers"]
    return jax.tree.map(lambda x: x[layer - (0 if is_dense else config.num_dense_layers)], stack)


@pytest.mark.parametrize("name", sets_with("loss"))
def test_loss_and_gradients(name):
    params, config, golden = load(name)
    tokens = golden["input_ids"]
    loss, gradients = jax.value_and_grad(
        lambda params: next_token_loss(params, config, tokens).loss
    )(params)
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
    gradients = jax.tree.map(np.asarray, gradients)
    checked = 0
    for key in (k.removeprefix("grad_") for k in golden if k.startswith("grad_")):
        want = golden[f"grad_{key}"]
        if key.startswith("model.layers."):
            _, _, layer, rest = key.split(".", 3)
            got = PLACES[rest](layer_of(gradients, config, int(layer)), config)
        else:
            got = PLACES[key](gradients, config)
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * np.abs(want).max() + 1e-6)
        checked += 1
    assert checked


# Each mistake that is easy to make must be seen by the golden sets.
def without_mscale_squared(params, config):
    scaling = dataclasses.replace(
        config.rope_scaling,
        mscale_all_dim=None,
        attention_factor=config.rope_scaling.cos_sin_factor,
    )
    return params, dataclasses.replace(config, rope_scaling=scaling)


def with_rope_halves_swapped(params, config):
    return params, dataclasses.replace(config, rope_interleave=not config.rope_interleave)


def without_correction_bias(params, config):
    moe = params["moe_layers"]
    zero = moe["mlp"]["e_score_correction_bias"] * 0
    mlp = moe["mlp"] | {"e_score_correction_bias": zero}
    return params | {"moe_layers": moe | {"mlp": mlp}}, config


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("v3_yarn", without_mscale_squared),
        ("v2_yarn", without_mscale_squared),
        ("v3", with_rope_halves_swapped),
        ("v3_half_noq_bias", with_rope_halves_swapped),
        ("minicpm3", with_rope_halves_swapped),
        ("v3", without_correction_bias),
        ("glm4_moe_lite", without_correction_bias),
    ],
)
def test_a_mistake_is_seen(name, mistake):
    params, config, golden = load(name)
    wrong_params, wrong_config = mistake(params, config)
    logits = jax_mla.forward(wrong_params, wrong_config, golden["input_ids"])
    assert np.abs(np.asarray(logits) - golden["logits"]).max() > 100 * BOUND


def test_wrong_inner_norm_epsilon_is_seen(monkeypatch):
    """The norms of the latents use 1e-6 although this set's rms_norm_eps is 1e-3."""
    from jax_mla.layers.mla import module as mla

    params, config, golden = load("v3_yarn_mscale")
    assert config.rms_norm_eps != 1e-6
    monkeypatch.setattr(mla, "LATENT_NORM_EPS", config.rms_norm_eps)
    # An equal config of another hash, so that no compiled program is reused.
    wrong = dataclasses.replace(config, pad_token_id=1)
    logits = jax_mla.forward(params, wrong, golden["input_ids"])
    assert np.abs(np.asarray(logits) - golden["logits"]).max() > 10 * BOUND
