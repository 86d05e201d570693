"""The families of published checkpoints: one entry per model_type, and the refused ones.

A family is a set of keys of config.json with defaults; it has no code. What its layers compute is
said by the fields of DeepSeekConfig.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

COMMON = frozenset({
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "attention_bias", "rms_norm_eps", "rope_theta", "rope_interleave",
    "rope_scaling", "max_position_embeddings", "tie_word_embeddings", "num_nextn_predict_layers",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
})  # fmt: skip
EXPERTS = frozenset({
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "first_k_dense_replace", "n_group", "topk_group", "topk_method", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor",
})  # fmt: skip
MINICPM = frozenset({"scale_emb", "scale_depth", "dim_model_base"})
FIELDS = COMMON | EXPERTS | MINICPM  # those of DeepSeekConfig
# Where these are null, the file might as well leave them out. Elsewhere a null has a meaning of its
# own (no query latent, no experts), or none, and is refused.
NULL_IS_DEFAULT = frozenset({
    "model_type", "attention_bias", "first_k_dense_replace", "topk_method", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor", "rms_norm_eps", "rope_theta", "rope_interleave",
    "max_position_embeddings", "scale_emb", "tie_word_embeddings", "num_nextn_predict_layers",
    "initializer_range", "dtype",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Router:
    """One `scoring_func` and what may be combined with it."""

    scoring_func: str
    topk_methods: tuple[str, ...]
    norm_topk_prob: tuple[bool, ...]


# With softmax, norm_topk_prob=True has no one meaning: DeepSeek-V2's own code then leaves out
# routed_scaling_factor, and transformers does not normalise.
SOFTMAX = Router("softmax", ("greedy", "group_limited_greedy"), (False,))
SIGMOID = Router("sigmoid", ("noaux_tc",), (True, False))


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model_type writes its config.json.

    fields: the keys that its reference reads; those of other families mean nothing to it.
    defaults: values of keys that a file leaves out.
    fixed: fields that its reference computes in one way, whatever a file says.
    routers: the first one is the default.
    dense_prefix: the key for the number of dense layers before the mixtures of experts.
    has_v_head_dim: False if v_head_dim defaults to hidden_size / num_attention_heads.
    """

    architecture: str
    defaults: Mapping[str, Any]
    fields: frozenset[str] = COMMON | EXPERTS
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    routers: tuple[Router, ...] = (SIGMOID,)
    dense_prefix: Literal["first_k_dense_replace", "mlp_layer_types"] = "first_k_dense_replace"
    has_v_head_dim: bool = True


_MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    defaults=_MLA | {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 1,
    },
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        defaults=_MLA | {
            "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 11008,
            "moe_intermediate_size": 1407, "num_hidden_layers": 32, "num_attention_heads": 32,
            "q_lora_rank": 1536, "n_routed_experts": 64, "n_shared_experts": 2,
            "first_k_dense_replace": 0, "topk_method": "greedy", "norm_topk_prob": False,
            "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
        },
        fixed={"rope_interleave": True},
        routers=(SOFTMAX, SIGMOID),
    ),
    "deepseek_v3": _V3,
    "kimi_k2": _V3,
    "youtu": Family(
        architecture="YoutuForCausalLM",
        defaults=_MLA | {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 6144,
            "num_hidden_layers": 32, "num_attention_heads": 16, "q_lora_rank": 1536,
            "max_position_embeddings": 131072, "tie_word_embeddings": True,
            "bos_token_id": 128000, "eos_token_id": 128001,
        },
        fields=COMMON,
    ),
    "minicpm3": Family(
        architecture="MiniCPM3ForCausalLM",
        defaults={
            "vocab_size": 73448, "hidden_size": 2560, "intermediate_size": 6400,
            "num_hidden_layers": 62, "num_attention_heads": 40, "q_lora_rank": 768,
            "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": True,
            "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
            "bos_token_id": 1, "eos_token_id": 2,
        },
        fields=COMMON | MINICPM,
        fixed={"rope_interleave": False},
        has_v_head_dim=False,
    ),
    "glm4_moe_lite": Family(
        architecture="Glm4MoeLiteForCausalLM",
        defaults={
            "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240,
            "moe_intermediate_size": 1536, "num_hidden_layers": 47, "num_attention_heads": 20,
            "q_lora_rank": 768, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64, "v_head_dim": 256, "n_routed_experts": 64,
            "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 202752, "bos_token_id": 0, "eos_token_id": 1,
        },
        dense_prefix="mlp_layer_types",
    ),
}  # fmt: skip

REFUSED = {
    "deepseek_v32": "its sparse attention (DSA indexer)",
    "glm_moe_dsa": "its sparse attention (DSA indexer)",
    "glm5_next": "its sparse and linear attention",
    "deepseek_v4": "its compressed sparse attention, which is not MLA",
    "longcat_flash": "its two attentions per layer and zero experts",
    "kimi_linear": "its linear-attention layers",
    "bailing_hybrid": "its linear-attention layers",
    "mistral4": "its position-dependent query scale",
    "mistral_large4": "its sparse attention (indexer)",
    "axk1": "its changes to the router",
    "axk2": "its sparse attention and gated norms",
    "dots3_note": "its sparse and sliding-window attention",
    "hy_v4": "its sparse attention and output gate",
}


def family_of(model_type: Any) -> Family:
    """The family of a config.json's model_type.

    Raises:
      ValueError: it is unknown, or known to have a part that this library does not compute.
    """
    if isinstance(model_type, str) and model_type in REFUSED:
        raise ValueError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type]
