"""A published config.json to the fields of a DeepSeekConfig and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_mla.config.families import EXPERTS, FAMILIES, MINICPM, NULL_IS_DEFAULT, Family, family_of
from jax_mla.config.fields import DTYPES, is_token_id
from jax_mla.config.hf_rope import read_rope, write_rope
from jax_mla.config.keys import by_field, refuse_other_computations
from jax_mla.config.wrappers import text_part


def read(config: Mapping[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """The arguments of DeepSeekConfig for the dict of a published config.json.

    Of a multimodal model these are its text model's.

    Raises:
      ValueError: the family is unknown, or has a part that is not computed; or two names of one
        field disagree.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a config must be an object with named values, got {config!r:.60}")
    given = by_field(_with_dtype(text_part(config), dtype))
    family = family_of(given.get("model_type"))
    values = dict(family.defaults)
    for key in family.fields & given.keys():
        if given[key] is not None or key not in NULL_IS_DEFAULT:
            values[key] = given[key]
    refuse_other_computations(given, values)
    if not family.has_v_head_dim and values.get("v_head_dim") is None:
        values["v_head_dim"] = _quotient(values["hidden_size"], values["num_attention_heads"])
    if EXPERTS <= family.fields:
        values["first_k_dense_replace"] = _num_dense_layers(given, values, family)
        if _has_experts(given, values):
            values |= _router(given["model_type"], values, family)
        else:
            values = {key: value for key, value in values.items() if key not in EXPERTS}
    values |= family.fixed
    values["eos_token_id"] = token_ids(values["eos_token_id"])
    values["rope_theta"], values["rope_scaling"] = read_rope(
        given, values["max_position_embeddings"]
    )
    return values


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> Mapping[str, Any]:
    """The file with another dtype than it says, or with its own, which must then be one of ours."""
    if dtype is not None:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        return config | {"dtype": dtype}
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise ValueError(
                f"{key} must be one of {', '.join(DTYPES)}, got {value!r}; the dtype argument of "
                "`load` and `DeepSeekConfig.from_hf` overrides it"
            )
    return config


def _quotient(hidden: Any, heads: Any) -> int | None:
    return hidden // heads if type(hidden) is type(heads) is int and heads > 0 else None


def _num_dense_layers(given: Mapping[str, Any], values: Mapping[str, Any], family: Family) -> Any:
    """The dense layers in front: `first_k_dense_replace` or the beginning of `mlp_layer_types`."""
    types, prefix = given.get("mlp_layer_types"), given.get("first_k_dense_replace")
    depth = values["num_hidden_layers"]
    if types is not None:
        found = _num_dense_types(types, depth)
    elif family.dense_prefix == "mlp_layer_types":
        found = family.defaults["first_k_dense_replace"]
    else:
        return values["first_k_dense_replace"]
    is_count = type(prefix) is type(depth) is int
    if prefix is not None and (min(prefix, depth) if is_count else prefix) != min(found, depth):
        source = "the default of mlp_layer_types" if types is None else "mlp_layer_types"
        raise ValueError(
            f"first_k_dense_replace={prefix!r} must be {found}, the dense layers of {source}"
        )
    return found


def _num_dense_types(types: Any, num_layers: int) -> int:
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
    return prefix


def _has_experts(given: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """False for null or 0 experts; and for dense layers only, with no word about experts."""
    if values["n_routed_experts"] in (None, 0):
        return False
    prefix, depth = values["first_k_dense_replace"], values["num_hidden_layers"]
    is_dense = type(prefix) is type(depth) is int and prefix >= depth
    return not is_dense or given.get("n_routed_experts") is not None


def _router(model_type: str, values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The router's fields, which must be a combination that the family has."""
    routers = {router.scoring_func: router for router in family.routers}
    scoring = values.get("scoring_func", family.routers[0].scoring_func)
    if not isinstance(scoring, str) or scoring not in routers:
        only = " or ".join(map(repr, routers))
        raise ValueError(
            f"{model_type} with scoring_func={scoring!r} is not supported, only {only}"
        )
    router = routers[scoring]
    method = values.get("topk_method", router.topk_methods[0])
    if method not in router.topk_methods:
        raise ValueError(
            f"{model_type} with scoring_func={scoring!r}: topk_method must be one of "
            f"{', '.join(router.topk_methods)}, got {method!r}"
        )
    normalises = values.get("norm_topk_prob", router.norm_topk_prob[0])
    if isinstance(normalises, bool) and normalises not in router.norm_topk_prob:
        raise ValueError(
            f"{model_type} with scoring_func={scoring!r} and norm_topk_prob={normalises!r} is not "
            f"supported, only {router.norm_topk_prob[0]!r}: its readers disagree about it"
        )
    return {"scoring_func": scoring, "topk_method": method, "norm_topk_prob": normalises}


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids of an `eos_token_id`: none, one, or a list."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(is_token_id(i) for i in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return ids


def write(values: Mapping[str, Any]) -> dict[str, Any]:
    """The dict to write as config.json, in the spelling that every reader knows.

    Args:
      values: the fields of a DeepSeekConfig, and of its RopeScaling as a dict.
    """
    family = FAMILIES[values["model_type"]]
    depth = values["num_hidden_layers"]
    has_experts = values["n_routed_experts"] is not None
    ignored = (MINICPM - family.fields) | (frozenset() if has_experts else EXPERTS)
    out = {key: value for key, value in values.items() if key not in ignored}
    num_dense = values["first_k_dense_replace"] if has_experts else depth
    if EXPERTS <= family.fields:
        # Readers take the number of experts to be given: a model without has dense layers only.
        out["first_k_dense_replace"] = num_dense
    if family.dense_prefix == "mlp_layer_types":
        num_dense = min(num_dense, depth)
        out["mlp_layer_types"] = ["dense"] * num_dense + ["sparse"] * (depth - num_dense)
    if has_experts and values["topk_method"] == "noaux_tc":
        # Its readers count groups; no groups is one group.
        out |= {"n_group": values["n_group"] or 1, "topk_group": values["topk_group"] or 1}
    eos, rope = values["eos_token_id"], values["rope_scaling"]
    return out | {
        "architectures": [family.architecture],
        "hidden_act": "silu",
        "num_key_value_heads": values["num_attention_heads"],
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "rope_scaling": None if rope is None else write_rope(rope),
    }
