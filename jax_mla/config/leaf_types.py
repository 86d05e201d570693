"""What every leaf of the parameter dict is: one table, read by path. No jax.

Which leaves a model has, and their sizes, is decided by its config: see `leaves`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

Path = tuple[str, ...]
Kind = Literal["matrix", "table", "vector", "fixed"]
LeafDtype = Literal["any", "kept", "float32"]
# The stacks of layers in the parameter dict. Their leaves have a leading axis "layers".
STACKS = ("dense_layers", "moe_layers")


@dataclasses.dataclass(frozen=True)
class LeafType:
    """What is known of a leaf by its path alone.

    Attributes:
      kind: how it is trained. A "matrix" decays, and Muon makes its updates orthogonal; a "table"
        (embedding, head) decays; a "vector" (norm, bias) does not; the optimizer
        leaves "fixed" alone.
      part: what it is counted under in reports.
      axes: the logical axes of `ShardingRules`, without "layers"; None is never sharded.
      contracted: of a matrix, the axes that its product with activations sums over.
      dtype: "any" is stored as the config says and narrowed to the compute dtype of training;
        "kept" is not narrowed; "float32" is float32 everywhere.
    """

    kind: Kind
    part: str
    axes: tuple[str | None, ...]
    contracted: tuple[str, ...] = ()
    dtype: LeafDtype = "any"

    @property
    def contracted_and_kept(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of each product, counted from the end; "expert" is in neither."""
        numbered = [(i - len(self.axes), axis) for i, axis in enumerate(self.axes)]
        contracted = tuple(i for i, axis in numbered if axis in self.contracted)
        kept = tuple(i for i, axis in numbered if axis not in (*self.contracted, "expert"))
        return contracted, kept

    def stored_dtype(self, dtype: str) -> str:
        """The dtype of this leaf in parameters of `dtype`."""
        return "float32" if self.dtype == "float32" else dtype


_NORM = LeafType("vector", "norms", ("norm",))
# It decides between scores that bfloat16 would make equal, and moves by a rule of its own.
ROUTER_BIAS = LeafType("fixed", "router", (None,), dtype="float32")
_UP = (("embed", "mlp"), ("embed",))
_DOWN = (("mlp", "embed"), ("mlp",))
_EXPERT_UP = (("expert", "embed", "mlp"), ("embed",))
_EXPERT_DOWN = (("expert", "mlp", "embed"), ("mlp",))
_HEADS = ("heads", "head_dim")


def _attention(axes: tuple[str, ...], contracted: tuple[str, ...]) -> LeafType:
    return LeafType("matrix", "attention", axes, contracted)


# By path, with "layer" for the name of a stack.
LEAF_TYPES = {
    "embed_tokens.weight": LeafType("table", "embedding", ("vocab", "embed")),
    "norm.weight": _NORM,
    "lm_head.weight": LeafType("table", "head", ("embed", "vocab")),
    "layer.input_layernorm.weight": _NORM,
    "layer.post_attention_layernorm.weight": _NORM,
    "layer.self_attn.q_proj.weight": _attention(("embed", *_HEADS), ("embed",)),
    "layer.self_attn.q_a_proj.weight": _attention(("embed", "q_latent"), ("embed",)),
    "layer.self_attn.q_a_proj.bias": LeafType("vector", "attention", ("q_latent",)),
    "layer.self_attn.q_a_layernorm.weight": _NORM,
    "layer.self_attn.q_b_proj.weight": _attention(("latent", *_HEADS), ("latent",)),
    "layer.self_attn.kv_a_proj_with_mqa.weight": _attention(("embed", "kv_latent"), ("embed",)),
    "layer.self_attn.kv_a_proj_with_mqa.bias": LeafType("vector", "attention", ("kv_latent",)),
    "layer.self_attn.kv_a_layernorm.weight": _NORM,
    "layer.self_attn.k_b_proj.weight": _attention((*_HEADS, "latent"), ("latent",)),
    "layer.self_attn.v_b_proj.weight": _attention((*_HEADS, "latent"), ("latent",)),
    "layer.self_attn.o_proj.weight": _attention((*_HEADS, "embed"), _HEADS),
    "layer.self_attn.o_proj.bias": LeafType("vector", "attention", ("norm",)),
    "layer.mlp.gate_proj.weight": LeafType("matrix", "dense_mlp", *_UP),
    "layer.mlp.up_proj.weight": LeafType("matrix", "dense_mlp", *_UP),
    "layer.mlp.down_proj.weight": LeafType("matrix", "dense_mlp", *_DOWN),
    # The router decides between nearly equal experts, so no pass narrows its weights.
    "layer.mlp.gate.weight": LeafType("matrix", "router", ("embed", None), ("embed",), "kept"),
    "layer.mlp.e_score_correction_bias": ROUTER_BIAS,
    "layer.mlp.experts.gate_proj.weight": LeafType("matrix", "routed_experts", *_EXPERT_UP),
    "layer.mlp.experts.up_proj.weight": LeafType("matrix", "routed_experts", *_EXPERT_UP),
    "layer.mlp.experts.down_proj.weight": LeafType("matrix", "routed_experts", *_EXPERT_DOWN),
    "layer.mlp.shared_experts.gate_proj.weight": LeafType("matrix", "shared_experts", *_UP),
    "layer.mlp.shared_experts.up_proj.weight": LeafType("matrix", "shared_experts", *_UP),
    "layer.mlp.shared_experts.down_proj.weight": LeafType("matrix", "shared_experts", *_DOWN),
}  # fmt: skip
PARTS = tuple(dict.fromkeys(leaf.part for leaf in LEAF_TYPES.values()))
# The first names of all paths.
TOP_LEVEL = {name.split(".")[0] for name in LEAF_TYPES} - {"layer"} | {*STACKS}


def leaf_type(path: Path) -> LeafType:
    """The entry of LEAF_TYPES for a path of the parameter dict.

    Raises:
      ValueError: the table has no such leaf.
    """
    in_table = ("layer", *path[1:]) if path[:1] and path[0] in STACKS else path
    if (found := LEAF_TYPES.get(".".join(in_table))) is None:
        raise ValueError(f"{'.'.join(path)} is not a parameter of any model: see LEAF_TYPES")
    return found


def check_known(tree: Mapping[str, Any]) -> None:
    """Every leaf of a parameter dict, or of a part of one, is in the table.

    Raises:
      ValueError: the table has no such leaf.
    """
    for path in flatten(tree):
        leaf_type(path)


def flatten(tree: Any, path: Path = ()) -> dict[Path, Any]:
    """What a nested dict holds, by path."""
    if not isinstance(tree, Mapping):
        return {path: tree}
    return {p: a for key, value in tree.items() for p, a in flatten(value, (*path, key)).items()}
