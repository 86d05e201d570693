"""The published names and shapes, from the config alone."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jax_mla
from jax_mla.checkpoint.published import published
from jax_mla.checkpoint.safetensors_file import read_header
from jax_mla.config.leaves import leaves_of

PUBLISHED_SIZES = {
    "v2_lite": 15_706_484_224,
    "v2": 235_741_434_880,
    "v3": 671_026_419_200,  # without the layer of multi-token prediction
    "kimi_k2": 1_026_408_232_448,
}


@pytest.mark.parametrize("preset", PUBLISHED_SIZES)
def test_number_of_parameters(preset):
    leaves = leaves_of(getattr(jax_mla, preset)())
    assert sum(leaf.size for leaf in leaves) == PUBLISHED_SIZES[preset]


@pytest.mark.parametrize(
    "name", ["v2_lite", "v2_group", "v3", "v3_half_noq_bias", "glm4_moe_lite", "minicpm3", "youtu"]
)
def test_published_names_and_shapes(golden, name):
    config = jax_mla.load(golden / name)[1]
    want = {name: t.shape for name, t in read_header(golden / name / "model.safetensors").items()}
    fills = published(leaves_of(config))
    assert {name: parts[0][0].published_shape for name, parts in fills.items()} == want


def test_published_names_come_layer_by_layer(golden):
    names = list(published(leaves_of(jax_mla.tiny())))
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert names[0] == "model.embed_tokens.weight"
    assert layers == sorted(layers)


def test_names_of_released_v3():
    names = published(leaves_of(jax_mla.v3()))
    for name in (
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.60.mlp.experts.255.up_proj.weight",
        "model.layers.60.self_attn.kv_b_proj.weight",
        "lm_head.weight",
    ):
        assert name in names
    assert not any(name.startswith("model.layers.61.") for name in names)


def test_each_leaf_against_plain_numpy(golden):
    """The rearrangements written out one by one, as a reader of the checkpoint would do them."""
    params, config = jax_mla.load(golden / "v2_group")
    params = jax.tree.map(np.asarray, params)
    raw = load_file(golden / "v2_group" / "model.safetensors")
    N, P, H = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    layer = "model.layers.1."
    attention = jax.tree.map(lambda leaf: leaf[0], params["moe_layers"]["self_attn"])
    mlp = jax.tree.map(lambda leaf: leaf[0], params["moe_layers"]["mlp"])
    q_b = raw[f"{layer}self_attn.q_b_proj.weight"]
    kv_b = raw[f"{layer}self_attn.kv_b_proj.weight"]
    o = raw[f"{layer}self_attn.o_proj.weight"]
    for head in range(N):
        rows = q_b[head * config.qk_head_dim : (head + 1) * config.qk_head_dim]
        assert (attention["q_b_proj"]["weight"][:, head] == rows.T).all()
        start = head * (P + H)
        assert (attention["k_b_proj"]["weight"][head] == kv_b[start : start + P]).all()
        assert (attention["v_b_proj"]["weight"][head] == kv_b[start + P : start + P + H]).all()
        assert (attention["o_proj"]["weight"][head] == o[:, head * H : (head + 1) * H].T).all()
    for expert in range(config.n_routed_experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            want = raw[f"{layer}mlp.experts.{expert}.{name}.weight"].T
            assert (mlp["experts"][name]["weight"][expert] == want).all()
    assert (mlp["gate"]["weight"] == raw[f"{layer}mlp.gate.weight"].T).all()
    assert (params["embed_tokens"]["weight"] == raw["model.embed_tokens.weight"]).all()
    assert (params["lm_head"]["weight"] == raw["lm_head.weight"].T).all()


def test_inspecting_needs_no_jax():
    code = (
        "import sys, jax_mla.checkpoint.matching, jax_mla.checkpoint.reading; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
