"""The leaves of the parameter dict of one model: sizes, and the published tensors. No jax.

Torch stores a Linear as [out, in] with heads flattened; our leaves are [in, out] with heads apart,
and layers (and experts) stacked in front. The letters are those of `jax_mla`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from jax_mla.config.leaf_types import STACKS, LeafType, Path, leaf_type
from jax_mla.config.model import DeepSeekConfig


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameter dict and how published tensors fill it.

    For one layer (and one expert) it is the tensor `name`, reshaped from `published_shape` to
    `split`, cut to `rows` of the second axis, and transposed by `order`.
    """

    path: Path
    name: str
    published_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    rows: tuple[int, int] | None = None
    layers: range | None = None
    num_experts: int | None = None

    @property
    def type(self) -> LeafType:
        return leaf_type(self.path)

    @property
    def stack(self) -> str | None:
        """The stack of layers that the leaf is in; None for embedding, last norm and head."""
        return None if self.layers is None else self.path[0]

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical axes of the stacked array."""
        return self.type.axes if self.layers is None else ("layers", *self.type.axes)

    @property
    def lead_shape(self) -> tuple[int, ...]:
        """The stacked axes: (), (L,) or (L, E). One published tensor for each index into them."""
        layers = () if self.layers is None else (len(self.layers),)
        return layers if self.num_experts is None else (*layers, self.num_experts)

    @property
    def cut(self) -> tuple[tuple[int, int], ...]:
        """The part of `split` that this leaf takes, as (start, stop) for each axis."""
        bounds = [(0, size) for size in self.split]
        if self.rows is not None:
            bounds[1] = self.rows
        return tuple(bounds)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = [stop - start for start, stop in self.cut]
        return (*self.lead_shape, *(sizes[axis] for axis in self.order))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def name_at(self, lead: tuple[int, ...]) -> str:
        """The published name that fills index `lead` of the stacked axes."""
        layer = self.layers[lead[0]] if self.layers is not None else None
        return self.name.format(layer=layer, expert=lead[-1] if lead else None)


@functools.lru_cache
def leaves_of(config: DeepSeekConfig, *, fused_experts: bool = False) -> tuple[Leaf, ...]:
    """Every leaf of the parameter dict, in the order in which checkpoints are written.

    `fused_experts` expects the names that transformers 5 uses in memory: all experts of a layer in
    one `gate_up_proj` [E, 2F, D] (gate, then up) and one `down_proj` [E, D, F].
    """
    D, V = config.hidden_size, config.vocab_size
    every_layer = [
        _vector("input_layernorm", D),
        *_attention(config),
        _vector("post_attention_layernorm", D),
    ]
    found = [_leaf("embed_tokens.weight", "model.embed_tokens.weight", (V, D))]
    for stack, layers in stacks_of(config).items():
        is_moe = stack == "moe_layers"
        mlp = _moe(config, fused_experts) if is_moe else _swiglu("mlp", D, config.intermediate_size)
        found += _stack(stack, layers, every_layer + mlp)
    found.append(_leaf("norm.weight", "model.norm.weight", (D,)))
    if not config.tie_word_embeddings:
        found.append(_leaf("lm_head.weight", "lm_head.weight", (V, D), order=(1, 0)))
    return tuple(found)


def stacks_of(config: DeepSeekConfig) -> dict[str, range]:
    """The layers of every stack that the model has, in their order."""
    prefix, depth = config.num_dense_layers, config.num_hidden_layers
    layers = {"dense_layers": range(prefix), "moe_layers": range(prefix, depth)}
    return {stack: layers[stack] for stack in STACKS if layers[stack]}


def routed_layers(config: DeepSeekConfig) -> range:
    """The layers that have a router."""
    return stacks_of(config).get("moe_layers", range(0))


def _stack(stack: str, layers: range, leaves: list[Leaf]) -> list[Leaf]:
    prefix = "model.layers.{layer}."
    return [
        dataclasses.replace(leaf, path=(stack, *leaf.path), name=prefix + leaf.name, layers=layers)
        for leaf in leaves
    ]


def _leaf(
    path: str,
    name: str,
    shape: tuple[int, ...],
    split: tuple[int, ...] | None = None,
    order: tuple[int, ...] | None = None,
    rows: tuple[int, int] | None = None,
) -> Leaf:
    """A leaf that is the published tensor as it stands, unless told otherwise."""
    split = shape if split is None else split
    order = tuple(range(len(split))) if order is None else order
    return Leaf(tuple(path.split(".")), name, shape, split, order, rows)


def _linear(module: str, outs: tuple[int, ...], ins: tuple[int, ...]) -> Leaf:
    """A torch Linear [out, in], either of which may be several axes in our leaf [*ins, *outs]."""
    order = (*range(len(outs), len(outs) + len(ins)), *range(len(outs)))
    shape = (math.prod(outs), math.prod(ins))
    return _leaf(f"{module}.weight", f"{module}.weight", shape, split=(*outs, *ins), order=order)


def _vector(module: str, size: int) -> Leaf:
    return _leaf(f"{module}.weight", f"{module}.weight", (size,))


def _bias(module: str, size: int) -> Leaf:
    return _leaf(f"{module}.bias", f"{module}.bias", (size,))


def _attention(config: DeepSeekConfig) -> list[Leaf]:
    D, N = config.hidden_size, config.num_attention_heads
    C, Q = config.kv_lora_rank, config.q_lora_rank
    P, R, H = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if Q is None:
        found = [_linear("self_attn.q_proj", (N, P + R), (D,))]
    else:
        found = [
            _linear("self_attn.q_a_proj", (Q,), (D,)),
            _vector("self_attn.q_a_layernorm", Q),
            _linear("self_attn.q_b_proj", (N, P + R), (Q,)),
        ]
    kv_b, shape, split = "self_attn.kv_b_proj.weight", (N * (P + H), C), (N, P + H, C)
    found += [
        _linear("self_attn.kv_a_proj_with_mqa", (C + R,), (D,)),
        _vector("self_attn.kv_a_layernorm", C),
        _leaf("self_attn.k_b_proj.weight", kv_b, shape, split, rows=(0, P)),
        _leaf("self_attn.v_b_proj.weight", kv_b, shape, split, rows=(P, P + H)),
        _linear("self_attn.o_proj", (D,), (N, H)),
    ]
    if config.attention_bias:
        if Q is not None:
            found.append(_bias("self_attn.q_a_proj", Q))
        found.append(_bias("self_attn.kv_a_proj_with_mqa", C + R))
        found.append(_bias("self_attn.o_proj", D))
    return found


def _swiglu(module: str, D: int, F: int) -> list[Leaf]:
    return [
        _linear(f"{module}.gate_proj", (F,), (D,)),
        _linear(f"{module}.up_proj", (F,), (D,)),
        _linear(f"{module}.down_proj", (D,), (F,)),
    ]


def _moe(config: DeepSeekConfig, fused_experts: bool) -> list[Leaf]:
    D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    assert E is not None and F is not None  # the config has checked it
    found = [_linear("mlp.gate", (E,), (D,))]
    if config.topk_method == "noaux_tc":
        bias = "e_score_correction_bias"
        found.append(_leaf(f"mlp.{bias}", f"mlp.gate.{bias}", (E,)))
    found += _fused_experts(E, D, F) if fused_experts else _experts(E, D, F)
    if config.n_shared_experts:
        found += _swiglu("mlp.shared_experts", D, F * config.n_shared_experts)
    return found


def _experts(E: int, D: int, F: int) -> list[Leaf]:
    return [
        dataclasses.replace(
            leaf, name=leaf.name.replace("experts.", "experts.{expert}."), num_experts=E
        )
        for leaf in _swiglu("mlp.experts", D, F)
    ]


def _fused_experts(E: int, D: int, F: int) -> list[Leaf]:
    experts = "mlp.experts."
    gate_up, down = f"{experts}gate_up_proj", f"{experts}down_proj"
    return [
        _leaf(f"{experts}gate_proj.weight", gate_up, (E, 2 * F, D), order=(0, 2, 1), rows=(0, F)),
        _leaf(f"{experts}up_proj.weight", gate_up, (E, 2 * F, D), order=(0, 2, 1), rows=(F, 2 * F)),
        _leaf(f"{down}.weight", down, (E, D, F), order=(0, 2, 1)),
    ]
