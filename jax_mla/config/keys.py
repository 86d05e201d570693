"""Keys of a config.json that are no field of DeepSeekConfig: which of them matter.

Every key is a field, another name of one, refused unless it has the value that is computed, or
known to change nothing. Any other key is ignored with a note.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from jax_mla.config.families import FIELDS

_LOG = logging.getLogger("jax_mla")

ALIASES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
    "torch_dtype": "dtype",
}
# Keys that change the computation, and the one value that is computed. Null is always allowed.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_mla": True,
    "moe_layer_freq": 1,
    "partial_rotary_factor": 1.0,
    "lm_head": True,
    "rm_head": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    # other attention
    "index_topk": None,
    "sliding_window": None,
    "sliding_window_size": None,
    "use_sliding_window": False,
    "attention_chunk_size": None,
    "linear_attn_config": None,
    "no_rope_layers": None,
    "nope_layer_interval": None,
    "qk_layernorm": False,
    "use_qk_norm": False,
    "qk_norm": False,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "attention_multiplier": None,
    "query_pre_attn_scalar": None,
    "mla_scale_q_lora": False,
    "mla_scale_kv_lora": False,
    # other scales and experts
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
    "zero_expert_num": 0,
    "swiglu_limit": None,
}
# Keys that change no logits: of training, of the code that wrote the file, of its generate().
_HARMLESS = frozenset({
    "architectures", "auto_map", "transformers_version", "unsloth_version", "unsloth_fixed",
    "model_name", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "torchscript", "use_bfloat16", "pretraining_tp",
    "ep_size", "head_dim", "aux_loss_alpha", "seq_aux", "router_aux_loss_coef",
    "quantization_config", "chunk_size_feed_forward", "cross_attention_hidden_size",
    "decoder_start_token_id", "finetuning_task", "id2label", "label2id", "is_decoder", "prefix",
    "problem_type", "sep_token_id", "task_specific_params", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "max_length", "min_length", "do_sample",
    "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature", "top_k",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores",
    "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
})  # fmt: skip
# Read elsewhere: sizes that must agree with fields, and other spellings of rope and dense layers.
_READ = frozenset({
    "num_key_value_heads", "qk_head_dim", "layer_types", "rope_parameters",
    "original_max_position_embeddings", "mlp_layer_types",
})  # fmt: skip


def by_field(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file's values under the names of fields; a null never replaces a value.

    Raises:
      ValueError: two names of one field have different values; both are named.
    """
    merged: dict[str, Any] = {}
    source: dict[str, str] = {}
    for key, value in config.items():
        field = ALIASES.get(key, key)
        if field == "dtype" and isinstance(value, str):
            value = value.removeprefix("torch.")
        if merged.get(field) is not None and value is not None and merged[field] != value:
            raise ValueError(
                f"{source[field]}={merged[field]!r} and {key}={value!r} are two names of one "
                "field, and must be equal"
            )
        if field not in merged or value is not None:
            merged[field], source[field] = value, key
    return merged


def refuse_other_computations(given: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises for a key that asks for something that is not computed; notes unknown ones.

    Args:
      given: the file's values by field.
      values: the same with the family's defaults.
    """
    model_type = given["model_type"]
    for key, expected in _ONLY.items():
        if (value := given.get(key)) not in (expected, None):
            raise ValueError(
                f"{model_type} with {key}={value!r} is not supported, only {expected!r}"
            )
    heads, kv_heads = values["num_attention_heads"], given.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        raise ValueError(f"num_key_value_heads={kv_heads} must equal num_attention_heads={heads}")
    nope, rotary, both = values["qk_nope_head_dim"], values["qk_rope_head_dim"], "qk_head_dim"
    if type(nope) is type(rotary) is int and given.get(both) not in (None, nope + rotary):
        raise ValueError(
            f"qk_head_dim={given[both]} must equal qk_nope_head_dim={nope} + "
            f"qk_rope_head_dim={rotary}"
        )
    kinds = given.get("layer_types") or ()
    if isinstance(kinds, list | tuple):
        kinds = sorted({str(kind) for kind in kinds} - {"full_attention"})
    if kinds:
        raise ValueError(f"layer_types must all be full_attention, got {kinds}")
    known = FIELDS | _ONLY.keys() | _HARMLESS | _READ
    unknown = {k: v for k, v in given.items() if k not in known and k[:1] != "_" and v}
    if unknown:
        shown = ", ".join(f"{key}={value!r:.60}" for key, value in unknown.items())
        _LOG.warning("config.json of a %s: ignored %s", model_type, shown)
