"""Every key of a config.json is computed, refused, known to change nothing, or noted."""

import dataclasses
import json
import logging

import jax
import pytest

import jax_mla
from jax_mla import DeepSeekConfig
from jax_mla.config.families import COMMON, EXPERTS, FAMILIES, FIELDS, NULL_IS_DEFAULT, REFUSED
from jax_mla.config.keys import ALIASES

V3 = {"model_type": "deepseek_v3"}
V2 = {"model_type": "deepseek_v2", "num_experts_per_tok": 6}
DENSE = [name for name, family in FAMILIES.items() if not EXPERTS <= family.fields]


def read(config, **fields) -> DeepSeekConfig:
    return DeepSeekConfig.from_hf(json.loads(json.dumps(config | fields)))


def test_families_name_the_fields_of_the_config():
    fields = {field.name: field for field in dataclasses.fields(DeepSeekConfig)}
    assert fields.keys() == FIELDS
    has_default = {n for n, f in fields.items() if f.default not in (None, dataclasses.MISSING)}
    assert has_default - {"eos_token_id"} == NULL_IS_DEFAULT
    for family in FAMILIES.values():
        assert COMMON <= family.fields and family.defaults.keys() <= family.fields
    assert not FAMILIES.keys() & REFUSED.keys()
    assert set(ALIASES.values()) <= FIELDS and not ALIASES.keys() & FIELDS


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_families_say_why(model_type):
    with pytest.raises(ValueError, match=f"'{model_type}' is not supported: its "):
        read({"model_type": model_type})


def test_v2_with_the_router_of_v3_is_computed():
    """As DeepSeek-VL2 is published: a model_type deepseek_v2 with sigmoid scores and a bias."""
    sigmoid = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1}
    config = read(V2, **sigmoid, norm_topk_prob=True, routed_scaling_factor=2.0)
    got = (config.scoring_func, config.topk_method, config.norm_topk_prob)
    assert got == ("sigmoid", "noaux_tc", True) and config.routed_scaling_factor == 2.0
    assert read(config.to_hf()) == config
    assert read(V2, **sigmoid).norm_topk_prob is False
    shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
    assert "e_score_correction_bias" in shapes["moe_layers"]["mlp"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob=True is not supported, only False"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false, got 'yes'"),
        (
            {"scoring_func": "sigmoid"},
            "'sigmoid': topk_method must be one of noaux_tc, got 'greedy'",
        ),
        ({"scoring_func": ["softmax"]}, r"scoring_func=\['softmax'\] is not supported, only"),
        ({"scoring_func": "relu"}, "scoring_func='relu' is not supported, only 'softmax' or"),
        (
            {"topk_method": "noaux_tc"},
            "'softmax': topk_method must be one of greedy.*, got 'noaux_tc'",
        ),
        ({"use_mla": False}, "deepseek_v2 with use_mla=False is not supported, only True"),
        ({"rm_head": True}, "rm_head=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ],
    ids=str,
)
def test_v2_is_computed_as_its_file_says_or_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        read(V2, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"norm_topk_prob": False}, {"scoring_func": "softmax"}, {"use_mla": True},
     {"norm_topk_prob": None, "scoring_func": None, "topk_method": None, "use_mla": None}],
    ids=str,
)  # fmt: skip
def test_v2_may_say_what_it_is(fields):
    assert read(V2, **fields) == read(V2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("use_mla", False), ("sliding_window", 4096), ("qk_layernorm", True), ("index_topk", 2048),
     ("attn_logit_softcapping", 30.0), ("logits_scaling", 2.0), ("is_encoder_decoder", True),
     ("moe_layer_freq", 2), ("partial_rotary_factor", 0.5), ("zero_expert_num", 4)],
)  # fmt: skip
def test_keys_of_other_computations_are_refused_in_every_family(family, key, value):
    with pytest.raises(ValueError, match=f"{family} with {key}={value!r} is not supported"):
        read({"model_type": family}, **{key: value})


def test_layer_types_and_sizes_that_follow_must_agree():
    full = ["full_attention"] * 61
    assert read(V3, layer_types=full, qk_head_dim=192, num_key_value_heads=128) == read(V3)
    with pytest.raises(ValueError, match=r"must all be full_attention, got \['linear_attention'"):
        read(V3, layer_types=[*full, "linear_attention"])
    with pytest.raises(ValueError, match="qk_head_dim=256 must equal qk_nope_head_dim=128 "):
        read(V3, qk_head_dim=256)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("spelled", "field", "value"),
    [
        ({"n_routed_experts": 64, "num_experts": None}, "n_routed_experts", 64),
        ({"n_routed_experts": 64, "num_local_experts": 64}, "n_routed_experts", 64),
        ({"n_routed_experts": None, "num_experts": 64}, "n_routed_experts", 64),
        ({"dtype": "float16", "torch_dtype": None}, "dtype", "float16"),
        ({"dtype": "float16", "torch_dtype": "torch.float16"}, "dtype", "float16"),
        ({"num_nextn_predict_layers": None, "num_mtp_layers": 2}, "num_nextn_predict_layers", 2),
    ],
    ids=str,
)
def test_a_null_never_replaces_another_name_of_the_field(spelled, field, value, order):
    spelled = dict(list(spelled.items())[::order])
    assert getattr(read(V3, **spelled), field) == value


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "spelled",
    [
        {"n_routed_experts": 256, "num_experts": 64},
        {"num_local_experts": 256, "num_experts": 64},
        {"torch_dtype": "bfloat16", "dtype": "float32"},
        {"num_nextn_predict_layers": 0, "num_mtp_layers": 1},
    ],
    ids=str,
)
def test_names_of_one_field_that_disagree_are_refused_with_both(spelled, order):
    spelled = dict(list(spelled.items())[::order])
    (one, first), (other, second) = spelled.items()
    message = f"{one}={first!r} and {other}={second!r} are two names of one field"
    with pytest.raises(ValueError, match=message):
        read(V3, **spelled)


YARN = {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_theta": 10000.0, "rope_parameters": YARN | {"rope_theta": 50000.0}},
            "rope_theta is given twice, as 10000.0 and as 50000.0",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 32}},
            "rope_scaling=.*40.* and rope_parameters=.*32.* must mean the same",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}},
            "must mean the same",
        ),
        (
            {"rope_scaling": YARN | {"type": "longrope"}},
            "the type of rope is given twice, as 'yarn' and as 'longrope'",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 8192},
            "original_max_position_embeddings is given twice, as 8192 and as 4096",
        ),
        ({"rope_scaling": YARN | {"attn_factor": 2.0}}, "attn_factor=2.0 are not supported"),
        ({"rope_parameters": {"rope_type": "default", "low_freq_factor": 1}}, "low_freq_factor=1"),
        (
            {"num_hidden_layers": 4, "first_k_dense_replace": 1,
             "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2},
            "first_k_dense_replace=1 must be 2, the dense layers of mlp_layer_types",
        ),
        (
            {"model_type": "glm4_moe_lite", "first_k_dense_replace": 3},
            "first_k_dense_replace=3 must be 1, the dense layers of the default of mlp_layer_types",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_two_spellings_of_rope_or_dense_layers_must_agree(fields, message):
    with pytest.raises(ValueError, match=message):
        read(V3, **fields)


def test_both_spellings_of_rope_may_be_there():
    one = read(V3, rope_theta=5, rope_scaling=YARN)
    both = {"rope_scaling": YARN | {"type": "yarn"}, "rope_parameters": YARN | {"rope_theta": 5}}
    assert read(V3, rope_theta=5, **both) == one
    assert read(V3, rope_scaling=None, rope_parameters=YARN | {"rope_theta": 5}) == one


def test_unknown_keys_are_ignored_with_one_note(caplog):
    with caplog.at_level(logging.WARNING, logger="jax_mla"):
        assert read(V3, my_scale=2.0, my_flag=False, _name="x", use_cache=True) == read(V3)
    assert caplog.messages == ["config.json of a deepseek_v3: ignored my_scale=2.0"]


@pytest.mark.parametrize("preset", ["tiny", "v2_lite", "v2", "v3", "kimi_k2"])
def test_what_is_written_is_read_without_a_note(preset, caplog):
    with caplog.at_level(logging.WARNING, logger="jax_mla"):
        read(getattr(jax_mla, preset)().to_hf())
    assert caplog.messages == []


@pytest.mark.parametrize("value", ["auto", "float8_e4m3fn", "torch.float64", "int8", 5])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_refused_or_overridden(key, value):
    config = V3 | {key: value}
    with pytest.raises(
        ValueError, match=f"{key} must be one of .*, got {value!r}; .* argument of `load`"
    ):
        read(config)
    assert DeepSeekConfig.from_hf(config, dtype="bfloat16").dtype == "bfloat16"
    both = V3 | {"dtype": "float32", "torch_dtype": "bfloat16"}
    assert DeepSeekConfig.from_hf(both, dtype="float16").dtype == "float16"


@pytest.mark.parametrize("experts", [0, None])
def test_no_experts_are_a_dense_model(experts):
    config = read(V3, n_routed_experts=experts, num_hidden_layers=2)
    assert config.num_moe_layers == 0 and config.n_routed_experts is None
    assert read(config.to_hf()) == config


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in DENSE])
def test_dense_layers_only_are_a_dense_model(family):
    """As readers understand it who know no null for the number of experts."""
    prefix = {"first_k_dense_replace": 3}
    if family == "glm4_moe_lite":
        prefix["mlp_layer_types"] = ["dense"] * 3
    config = read({"model_type": family}, num_hidden_layers=3, **prefix)
    assert config.num_moe_layers == 0 and config.n_routed_experts is None
    written = config.to_hf()
    assert written["first_k_dense_replace"] == 3 and not written.keys() & {"n_routed_experts"}
    assert read(written) == config


def test_experts_that_no_layer_has_are_kept():
    config = read(V3, num_hidden_layers=3, n_routed_experts=8, num_experts_per_tok=2)
    assert config.num_moe_layers == 0 and config.n_routed_experts == 8
    assert read(config.to_hf()) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_topk_prob", 1, "norm_topk_prob must be true or false, got 1"),
        ("hidden_size", True, "hidden_size must be an integer, got True"),
        ("n_shared_experts", -1, "n_shared_experts must be an integer of at least 0, got -1"),
        ("scale_depth", 0.0, "scale_depth must be a finite number above 0, got 0.0"),
        ("eos_token_id", 5, "eos_token_id must be a tuple of token ids, got 5"),
        (
            "topk_method",
            "best",
            "topk_method must be one of greedy, group_limited_greedy.*, got 'best'",
        ),
        ("model_type", "llama", "model_type must be one of deepseek_v2.*, got 'llama'"),
    ],
)
def test_the_dataclass_checks_itself(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(jax_mla.v3(), **{field: value})
