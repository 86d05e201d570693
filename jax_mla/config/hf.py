"""A published config.json to a DeepSeekConfig and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_mla.config import RopeScaling
from jax_mla.config.model import DeepSeekConfig, is_token_id
from jax_mla.config.rope import is_number

# What a published config.json may leave out: the defaults of each reference configuration.
_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V3 = _MLA | {
    "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": _MLA | {
        "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
        "moe_intermediate_size": 1407, "num_hidden_layers": 32, "num_attention_heads": 32,
        "q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2,
        "first_k_dense_replace": 0, "topk_method": "greedy", "norm_topk_prob": False,
        "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
    },
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "youtu": _MLA | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 32, "num_attention_heads": 16, "q_lora_rank": 1536,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "minicpm3": {
        "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400,
        "num_hidden_layers": 62, "num_attention_heads": 40, "q_lora_rank": 768,
        "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": True,
        "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "glm4_moe_lite": {
        "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
        "moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20,
        "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64,
        "v_head_dim": 256, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 202752,
        "bos_token_id": 0, "eos_token_id": 1,
    },
}  # fmt: skip
_DENSE = {"youtu", "minicpm3"}
_ARCHITECTURES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "youtu": "YoutuForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}
_WHY_NOT = {
    "deepseek_v32": "its sparse attention (DSA indexer)",
    "glm_moe_dsa": "its sparse attention (DSA indexer)",
    "glm5_next": "its sparse and linear attention",
    "deepseek_v4": "its compressed sparse attention, which is not MLA",
    "longcat_flash": "its two attentions a layer and zero experts",
    "kimi_linear": "its linear-attention layers",
    "bailing_hybrid": "its linear-attention layers",
    "mistral4": "its position-dependent query scale",
    "mistral_large4": "its sparse attention (indexer)",
    "axk1": "its changes to the router",
    "axk2": "its sparse attention and gated norms",
    "dots3_note": "its sparse and sliding-window attention",
    "hy_v4": "its sparse attention and output gate",
}
# Published under two names.
_ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "torch_dtype": "dtype",
}
_FLOATS = {
    "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
    "rope_theta",
    "routed_scaling_factor", "rms_norm_eps", "scale_emb", "scale_depth", "initializer_range",
}  # fmt: skip
_YARN_FIELDS = {
    "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate",
}  # fmt: skip
_LONGROPE_FIELDS = {
    "factor", "mscale", "mscale_all_dim", "attention_factor", "short_factor", "long_factor",
}  # fmt: skip


def read(config: Mapping[str, Any]) -> DeepSeekConfig:
    """Reads the dict of a published config.json."""
    family = _family(config)
    given = {_ALIASES.get(key, key): value for key, value in config.items()}
    _refuse_what_we_do_not_compute(family, given)
    known = {field.name for field in dataclasses.fields(DeepSeekConfig)} - {"rope_scaling"}
    values: dict[str, Any] = _DEFAULTS[family] | {k: v for k, v in given.items() if k in known}
    if family == "minicpm3" and values.get("v_head_dim") is None:
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        are_sizes = type(hidden) is int and type(heads) is int and heads > 0
        values["v_head_dim"] = hidden // heads if are_sizes else None
    if family == "glm4_moe_lite":  # its reference reads mlp_layer_types only
        values["first_k_dense_replace"] = _DEFAULTS[family]["first_k_dense_replace"]
    ignored = () if family == "minicpm3" else _MINICPM_FIELDS
    if family in _DENSE:
        ignored += _MOE_FIELDS
    else:
        values |= _router(family, values) | _dense_prefix(given, values["num_hidden_layers"])
    values = {key: value for key, value in values.items() if key not in ignored}
    if family in ("deepseek_v2", "minicpm3"):  # their rope layout is fixed, whatever the file says
        values["rope_interleave"] = family == "deepseek_v2"
    values["eos_token_id"] = _as_ids(values["eos_token_id"])
    values["rope_theta"], values["rope_scaling"] = _rope(given, values)
    missing = dataclasses.MISSING  # a null stands where null means something, else for the default
    required = {f.name for f in dataclasses.fields(DeepSeekConfig) if f.default is missing}
    optional = {f.name for f in dataclasses.fields(DeepSeekConfig) if f.default is None}
    keep = required | optional
    for key in ("tie_word_embeddings", "attention_bias", "norm_topk_prob", "rope_interleave"):
        if not isinstance(values.get(key), bool | None):
            raise ValueError(f"{key} must be true or false, got {values[key]!r}")
    fields = _with_floats({k: v for k, v in values.items() if v is not None or k in keep})
    return DeepSeekConfig(**fields)


def _with_floats(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that mean floats as floats: JSON does not tell 40 from 40.0."""
    out = dict(values)
    for key in _FLOATS & out.keys():
        if (value := out[key]) is not None:
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{key} must be a number, got {value!r}")
            try:
                out[key] = float(value)
            except OverflowError:
                raise ValueError(f"{key} must be a number, got one beyond 1e308") from None
    return out


def _family(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise ValueError(f"a config must be an object with named values, got {config!r:.60}")
    family = config.get("model_type")
    if isinstance(family, str) and family in _WHY_NOT:
        raise ValueError(f"model_type {family!r} is not supported: {_WHY_NOT[family]}")
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(_DEFAULTS)}")
    return family


def _refuse_what_we_do_not_compute(family: str, given: Mapping[str, Any]) -> None:
    for key, expected in (
        ("hidden_act", "silu"), ("mlp_bias", False), ("moe_layer_freq", 1), ("index_topk", None),
        ("partial_rotary_factor", 1.0),
    ):  # fmt: skip
        if (value := given.get(key, expected)) not in (expected, None):
            raise ValueError(f"{family} with {key}={value!r} is not supported, only {expected!r}")
    heads = given.get("num_attention_heads", _DEFAULTS[family]["num_attention_heads"])
    kv_heads = given.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads}")


def _router(family: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """V2 takes a softmax and never renormalises; all later families take V3's biased sigmoid."""
    if family == "deepseek_v2":
        if (method := values["topk_method"]) not in ("greedy", "group_limited_greedy"):
            raise ValueError(
                f"deepseek_v2 with topk_method={method!r} is not one of "
                "greedy, group_limited_greedy"
            )
        return {"scoring_func": "softmax", "norm_topk_prob": False}
    for key, expected in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (value := values.get(key)) not in (expected, None):
            raise ValueError(f"{family} with {key}={value!r} is not supported, only {expected!r}")
    return {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _dense_prefix(given: Mapping[str, Any], num_layers: int) -> dict[str, int]:
    """`mlp_layer_types`, where present, replaces `first_k_dense_replace`."""
    types = given.get("mlp_layer_types")
    if types is None:
        return {}
    if not isinstance(types, list):
        raise ValueError(
            f"mlp_layer_types must be a list with a name for each layer, got {types!r}"
        )
    prefix = types.index("sparse") if "sparse" in types else len(types)
    if types != ["dense"] * prefix + ["sparse"] * (len(types) - prefix):
        raise ValueError(f"mlp_layer_types must be dense layers, then sparse ones, got {types}")
    if len(types) != num_layers:
        raise ValueError(
            f"mlp_layer_types has {len(types)} entries, num_hidden_layers is {num_layers}"
        )
    return {"first_k_dense_replace": prefix}


def _as_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    if not all(is_token_id(i) for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {eos!r}")
    return ids


def _rope(given: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_theta` + `rope_scaling` (old) or `rope_parameters` (new)."""
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_scaling must be an object with named values, got {rope!r}")
    rope = _with_floats(rope)
    top = _with_floats({"rope_theta": given.get("rope_theta")})
    theta = rope.pop("rope_theta", None) or top["rope_theta"] or 10000.0
    if (partial := rope.get("partial_rotary_factor")) not in (1.0, None):
        raise ValueError(
            f"rope parameters with partial_rotary_factor={partial!r} are not supported, only 1.0"
        )
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    if rope_type == "default":
        return theta, None
    longest = values.get("max_position_embeddings") or DeepSeekConfig.max_position_embeddings
    key = "original_max_position_embeddings"
    original = given.get(key) or rope.get(key) or longest
    for name, value in ((key, original), ("max_position_embeddings", longest)):
        if not is_number(value) or value < 1 or value != int(value):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    original = int(original)
    if rope_type == "longrope" and longest > original:
        raise ValueError(
            f"longrope with max_position_embeddings={longest} beyond "
            f"original_max_position_embeddings={original} is not supported"
        )
    fields = _LONGROPE_FIELDS if rope_type == "longrope" else _YARN_FIELDS
    scaling: dict[str, Any] = {k: v for k, v in rope.items() if k in fields and v is not None}
    scaling.setdefault("factor", longest / original)
    for key in ("beta_fast", "beta_slow"):  # null and 0 mean the default
        if not scaling.get(key):
            scaling.pop(key, None)
    for key in ("short_factor", "long_factor"):
        if isinstance(factors := scaling.get(key), list):
            scaling[key] = tuple(float(f) if is_number(f) else f for f in factors)
    return theta, RopeScaling(rope_type, original_max_position_embeddings=original, **scaling)


_MOE_FIELDS = (
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "first_k_dense_replace", "n_group", "topk_group", "topk_method", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor",
)  # fmt: skip
_MINICPM_FIELDS = ("scale_emb", "scale_depth", "dim_model_base")


def write(config: DeepSeekConfig) -> dict[str, Any]:
    """The dict to write as config.json, in the spelling that every reader knows."""
    out = dataclasses.asdict(config)
    for key in _MOE_FIELDS if config.n_routed_experts is None else ():
        out.pop(key)
    for key in _MINICPM_FIELDS if config.model_type != "minicpm3" else ():
        out.pop(key)
    out["architectures"] = [_ARCHITECTURES[config.model_type]]
    out["hidden_act"] = "silu"
    out["num_key_value_heads"] = config.num_attention_heads
    if config.topk_method == "noaux_tc" and config.n_routed_experts is not None:
        # Its readers count groups; no groups is one group.
        out |= {"n_group": config.n_group or 1, "topk_group": config.topk_group or 1}
    if config.model_type == "glm4_moe_lite":
        out["mlp_layer_types"] = ["dense"] * config.num_dense_layers + [
            "sparse"
        ] * config.num_moe_layers
    eos = config.eos_token_id
    out["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else list(eos)
    out["rope_scaling"] = None if config.rope_scaling is None else _write_rope(config.rope_scaling)
    return out


def _write_rope(scaling: RopeScaling) -> dict[str, Any]:
    fields = _LONGROPE_FIELDS if scaling.rope_type == "longrope" else _YARN_FIELDS
    out: dict[str, Any] = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
    out = {k: v for k, v in out.items() if k in fields | {"original_max_position_embeddings"}}
    for key in ("short_factor", "long_factor"):
        if key in out:
            out[key] = list(out[key])
    return out | {"type": scaling.rope_type, "rope_type": scaling.rope_type}
