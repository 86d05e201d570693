"""Configs: published files in both spellings, presets with published numbers, clear refusals."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from golden_sets import NAMES, read_config

import jax_mla
from jax_mla import DeepSeekConfig
from jax_mla.training import Precision

PRESETS = ["tiny", "v2_lite", "v2", "v3", "kimi_k2"]
YARN = {
    "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_golden_configs_survive_a_round_trip(name):
    config = read_config(name)
    assert DeepSeekConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    hash(config)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_a_round_trip(preset):
    config = getattr(jax_mla, preset)()
    assert DeepSeekConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("preset", "billions", "row"),
    [("v2_lite", 15.71, 576), ("v2", 235.74, 576), ("v3", 671.03, 576), ("kimi_k2", 1026.41, 576)],
)
def test_presets_have_the_published_number_of_parameters(preset, billions, row):
    c = getattr(jax_mla, preset)()
    D, N, C, Q = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.q_lora_rank
    query = D * N * c.qk_head_dim if Q is None else D * Q + Q + Q * N * c.qk_head_dim
    attention = query + D * c.cache_row_dim + C
    attention += C * N * (c.qk_nope_head_dim + c.v_head_dim) + N * c.v_head_dim * D
    expert = 3 * D * c.moe_intermediate_size
    router = D * c.n_routed_experts + (c.n_routed_experts if c.topk_method == "noaux_tc" else 0)
    moe = (c.n_routed_experts + c.n_shared_experts) * expert + router
    total = 2 * c.vocab_size * D + D + c.num_hidden_layers * (attention + 2 * D)
    total += c.num_dense_layers * 3 * D * c.intermediate_size + c.num_moe_layers * moe
    assert total / 1e9 == pytest.approx(billions, abs=0.01)
    assert c.cache_row_dim == row


@pytest.mark.parametrize(
    "fields",
    [{"n_shared_experts": None}, {"bos_token_id": None, "eos_token_id": ()}, {"q_lora_rank": None}],
    ids=str,
)
def test_nulls_survive_a_round_trip(fields):
    """A null must not come back as the family's default."""
    config = dataclasses.replace(jax_mla.v3(), **fields)
    assert DeepSeekConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_no_groups_are_written_as_one_group():
    config = dataclasses.replace(jax_mla.v3(), n_group=None, topk_group=None)
    read = DeepSeekConfig.from_hf(config.to_hf())
    assert (read.n_group, read.topk_group) == (1, 1)


def test_old_and_new_spelling_of_rope_are_one_config():
    base = {"model_type": "deepseek_v3"}
    old = base | {"rope_theta": 50000, "rope_scaling": YARN | {"type": "yarn"}}
    new = base | {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 50000}}
    assert DeepSeekConfig.from_hf(old) == DeepSeekConfig.from_hf(new)
    assert DeepSeekConfig.from_hf(old).rope_theta == 50000
    plain = DeepSeekConfig.from_hf(base | {"rope_scaling": None, "rope_theta": 7})
    assert plain.rope_scaling is None and plain.rope_theta == 7


LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 32768,
}  # fmt: skip


def test_longrope_keeps_its_factor_and_both_tables():
    hf = {
        "model_type": "minicpm3",
        "rope_parameters": LONGROPE | {"factor": 4, "mscale_all_dim": 1},
    }
    config = DeepSeekConfig.from_hf(hf)
    scaling = config.rope_scaling
    assert scaling.cos_sin_factor == pytest.approx((1 + math.log(4) / math.log(32768)) ** 0.5)
    assert config.softmax_scale == pytest.approx(96**-0.5 * (0.1 * math.log(4) + 1) ** 2)
    assert scaling.long_factor == (2.0,) * 16 and scaling.max_tokens == 32768
    assert DeepSeekConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    without = DeepSeekConfig.from_hf({"model_type": "minicpm3", "rope_parameters": LONGROPE})
    assert without.rope_scaling.factor == without.rope_scaling.cos_sin_factor == 1.0
    same = dataclasses.replace(scaling, long_factor=scaling.short_factor)
    assert same.max_tokens is None


def test_scalars_of_minicpm3_mean_nothing_elsewhere():
    scalars = {"scale_emb": 3.0, "scale_depth": 1.2, "dim_model_base": 10}
    for family in ("deepseek_v3", "youtu"):
        plain = DeepSeekConfig.from_hf({"model_type": family})
        assert DeepSeekConfig.from_hf({"model_type": family} | scalars) == plain


def test_experts_mean_nothing_in_dense_families():
    experts = {"n_routed_experts": 6, "moe_intermediate_size": 20, "n_shared_experts": 1,
               "num_experts_per_tok": 3, "n_group": 1, "topk_method": "x"}  # fmt: skip
    for family in ("minicpm3", "youtu"):
        plain = DeepSeekConfig.from_hf({"model_type": family})
        assert DeepSeekConfig.from_hf({"model_type": family} | experts) == plain


def test_yarn_factor_may_be_left_to_the_lengths():
    rope = YARN | {"type": "yarn", "factor": None, "beta_fast": None}
    config = DeepSeekConfig.from_hf(
        {"model_type": "deepseek_v3", "max_position_embeddings": 32768, "rope_scaling": rope}
    )
    assert config.rope_scaling.factor == 8.0 and config.rope_scaling.beta_fast == 32.0


def test_softmax_scale_holds_mscale_squared():
    assert jax_mla.v3().softmax_scale == pytest.approx(0.1352337788608801)
    assert dataclasses.replace(jax_mla.v3(), rope_scaling=None).softmax_scale == 192**-0.5


def test_other_names_of_fields():
    config = DeepSeekConfig.from_hf(
        {"model_type": "deepseek_v3", "num_local_experts": 64, "num_mtp_layers": 2,
         "torch_dtype": "bfloat16", "eos_token_id": [5, 6]}
    )  # fmt: skip
    assert config.n_routed_experts == 64 and config.num_nextn_predict_layers == 2
    assert config.dtype == "bfloat16" and config.eos_token_id == (5, 6)


def test_families_differ_where_they_should():
    read = lambda family, **fields: DeepSeekConfig.from_hf({"model_type": family} | fields)  # noqa: E731
    v2 = read("deepseek_v2", num_experts_per_tok=6, norm_topk_prob=False, rope_interleave=False)
    assert (v2.scoring_func, v2.norm_topk_prob, v2.rope_interleave) == ("softmax", False, True)
    youtu = read("youtu")
    assert youtu.num_moe_layers == 0 and youtu.tie_word_embeddings
    minicpm = read("minicpm3")
    assert minicpm.v_head_dim == 64 and not minicpm.rope_interleave
    assert minicpm.residual_scale == pytest.approx(1.4 / 62**0.5)
    assert minicpm.logits_divisor == 10.0 and minicpm.scale_emb == 12
    glm = read("glm4_moe_lite")
    assert (glm.num_dense_layers, glm.num_moe_layers, glm.qk_nope_head_dim) == (1, 46, 192)
    types = ["dense"] * 3 + ["sparse"] * 44
    assert read("glm4_moe_lite", mlp_layer_types=types).num_dense_layers == 3


V3 = {"model_type": "deepseek_v3"}


def with_rope(scaling=YARN | {"rope_type": "yarn"}, family="deepseek_v3", **fields):
    return {"model_type": family, "rope_parameters": scaling | fields}


def with_longrope(**fields):
    return with_rope(LONGROPE, "minicpm3", **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "must be one of deepseek_v2, deepseek_v3.*, got 'llama'"),
        ({}, "model_type must be one of .*, got None"),
        ({"model_type": "deepseek_v32"}, "'deepseek_v32' is not supported: its sparse attention"),
        ({"model_type": "kimi_linear"}, "its linear-attention layers"),
        (V3 | {"index_topk": 2048}, "index_topk=2048 is not supported"),
        (V3 | {"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (V3 | {"rope_theta": -5}, "rope_theta must be a finite number above 0, got -5.0"),
        (V3 | {"n_shared_experts": -1}, "n_shared_experts must be an integer of at least 0"),
        (V3 | {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (V3 | {"num_key_value_heads": 8}, "num_key_value_heads=8 must equal num_att"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported"),
        (V3 | {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        (V3 | {"n_group": 7}, "n_routed_experts=256 is not a multiple of n_group=7"),
        (V3 | {"topk_group": 9}, "topk_group=9 exceeds n_group=8"),
        (V3 | {"num_experts_per_tok": 200}, "num_experts_per_tok=200 exceeds the 128 experts"),
        (V3 | {"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even, got 63"),
        (V3 | {"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        (V3 | {"hidden_size": "big"}, "hidden_size must be an integer, got 'big'"),
        (V3 | {"num_hidden_layers": 2.5}, "num_hidden_layers must be an integer, got 2.5"),
        (V3 | {"qk_rope_head_dim": None}, "qk_rope_head_dim must be an integer, got None"),
        (V3 | {"eos_token_id": "x"}, "must be a token id or a list of them, got 'x'"),
        (V3 | {"eos_token_id": 5.5}, "must be a token id or a list of them, got 5.5"),
        (V3 | {"first_k_dense_replace": "x"}, "first_k_dense_replace must be an integer"),
        (V3 | {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        (V3 | {"rope_parameters": [1]}, r"must be an object with named values, got \[1\]"),
        (V3 | {"rms_norm_eps": "small"}, "rms_norm_eps must be a finite number .*, got 'small'"),
        (V3 | {"rope_scaling": YARN | {"type": "yarn", "factor": "x"}}, "factor must be a number"),
        (V3 | {"rope_scaling": YARN | {"type": "yarn", "factor": 0}}, "factor must be .* above 0"),
        (
            V3 | {"rope_scaling": YARN | {"type": "yarn", "original_max_position_embeddings": "x"}},
            "original_max_position_embeddings must be an integer of at least 1, got 'x'",
        ),
        ([V3], "a config must be an object with named values"),
        (V3 | {"mlp_layer_types": 5}, "mlp_layer_types must be a list"),
        (V3 | {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope type must be .*'dynamic'"),
        ({"model_type": "deepseek_v2"}, "moe_intermediate_size, got 64, None and 1407"),
        ({"model_type": "deepseek_v2", "topk_method": "best"}, "must be one of .*, got 'best'"),
        (
            {"model_type": "minicpm3", "max_position_embeddings": 65536,
             "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32768}},
            "max_position_embeddings=65536 beyond original_max_position_embeddings=32768",
        ),
        (
            {"model_type": "minicpm3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "short_factor has 1 entries, expected qk_rope_head_dim / 2 = 16",
        ),
        (
            {"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense"]},
            "must be dense layers, then sparse ones",
        ),
        (
            V3 | {"num_hidden_layers": 3, "mlp_layer_types": ["dense"]},
            "mlp_layer_types has 1 entries, num_hidden_layers is 3",
        ),
        (
            V3 | {"num_hidden_layers": 3, "mlp_layer_types": ["dense"] + ["sparse"] * 3},
            "mlp_layer_types has 4 entries, num_hidden_layers is 3",
        ),
        ({"model_type": ["deepseek_v3"]}, r"model_type must be one of .*, got \['deepseek_v3'\]"),
        (V3 | {"pad_token_id": "x"}, "pad_token_id must be a token id or null, got 'x'"),
        (V3 | {"pad_token_id": [3]}, r"pad_token_id must be a token id or null, got \[3\]"),
        (V3 | {"pad_token_id": 1.5}, "pad_token_id must be a token id or null, got 1.5"),
        (V3 | {"pad_token_id": 2**40}, "pad_token_id must be .* got 1099511627776"),
        (V3 | {"bos_token_id": "x"}, "bos_token_id must be a token id or null, got 'x'"),
        (V3 | {"eos_token_id": True}, "must be a token id or a list of them, got True"),
        (V3 | {"rope_theta": [1]}, r"rope_theta must be a finite number above 0, got \[1\]"),
        (V3 | {"rope_theta": "x"}, "rope_theta must be a finite number above 0, got 'x'"),
        (V3 | {"rope_theta": True}, "rope_theta must be a finite number above 0, got True"),
        (V3 | {"rope_theta": 10**400}, "rope_theta must be a finite number above 0"),
        (with_rope(mscale=math.inf), "mscale must be a finite number of at least 0, got inf"),
        (with_rope(attention_factor=-1), "attention_factor must be a finite number .* got -1.0"),
        (with_rope(truncate="no"), "truncate must be true or false, got 'no'"),
        (with_rope(rope_theta=1.0), "yarn needs a rope_theta above 1, got 1.0"),
        (with_rope(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 are not supported"),
        (with_rope(original_max_position_embeddings=math.inf), "must be an integer .* got inf"),
        (with_rope() | {"max_position_embeddings": "x"}, "max_position_embeddings must be an int"),
        (with_longrope(short_factor=5), "short_factor must be a list of numbers above 0, got 5"),
        (with_longrope(short_factor=None), "short_factor must be a list of numbers .* got None"),
        (with_longrope(short_factor=[0.0] * 16), r"short_factor must be a list .* got \(0.0"),
        (with_longrope(long_factor=["a"] * 16), r"long_factor must be a list .* got \('a'"),
        (with_longrope(long_factor=[1.0]), "long_factor has 1 entries, expected .* 16"),
        (
            with_longrope(factor=2, original_max_position_embeddings=1)
            | {"max_position_embeddings": 1},
            "longrope with factor=2.0 needs an original_max_position_embeddings of at least 2",
        ),
        (
            {"model_type": "minicpm3", "num_attention_heads": 0},
            "num_attention_heads must be at least 1, got 0",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_computed_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DeepSeekConfig.from_hf(config)


def test_a_dtype_may_be_one_of_jax_or_numpy():
    """Wherever a config or a recipe names one; it is kept, and hashes, as its name."""
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
        config = dataclasses.replace(jax_mla.tiny(), dtype=dtype)
        assert config.dtype == "bfloat16"
        assert hash(config) == hash(dataclasses.replace(jax_mla.tiny(), dtype="bfloat16"))
        assert jax_mla.DeepSeekConfig.from_hf(V3, dtype=dtype).dtype == "bfloat16"
        assert Precision(compute=dtype) == Precision(compute="bfloat16")
    assert dataclasses.replace(jax_mla.tiny(), dtype=np.float32).dtype == "float32"
    with pytest.raises(ValueError, match=r"dtype must be one of float32, .* got 'int8'"):
        dataclasses.replace(jax_mla.tiny(), dtype=jnp.int8)
