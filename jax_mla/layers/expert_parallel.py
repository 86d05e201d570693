"""Routed experts as functions of arrays: on one device, and over the mesh axes that split experts.

Under a mesh the functions run inside of shard_map, on a device's own tokens and experts. `dense`
lets every device see all tokens and apply its own experts to them; `a2a` and `ragged` send each
token only to the devices that own its experts, `a2a` in blocks padded to equal size. All equal the
layer on one device: no token is dropped, unless `a2a` is given a capacity.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_mla.layers import expert_exchange
from jax_mla.sharding import Placement, ShardingRules
from pallas_kernels import grouped_matmul

# gate_proj, up_proj and down_proj of all experts of one layer or of a pool of layers.
Weights = tuple[Float[Array, "L E D F"], Float[Array, "L E D F"], Float[Array, "L E F D"]]


def apply_local(
    x: Float[Array, "M D"],
    expert_index: Int[Array, "M A"],
    expert_weight: Float[Array, "M A"],
    weights: Weights,
    layer: int | Int[Array, ""],
    embed_axes: tuple[str, ...] = (),
) -> Float[Array, "M D"]:
    """sum_a expert_weight[m, a] * expert[expert_index[m, a]](x[m]), float32.

    An index outside of 0 to E - 1 adds nothing. Weights are split by D over mesh axes `embed_axes`.
    """
    active = expert_index.shape[1]
    source = jnp.arange(expert_index.size) // active
    rows = _run(x, source, expert_index.reshape(-1), weights, layer, embed_axes)
    return _combine(rows.reshape(-1, active, x.shape[1]), expert_weight)


def apply_on_mesh(
    x: Float[Array, "B T D"],
    expert_index: Int[Array, "B T A"],
    expert_weight: Float[Array, "B T A"],
    weights: Weights,
    layer: int | Int[Array, ""],
    placement: Placement,
) -> Float[Array, "B T D"]:
    """`apply_local` of every device's tokens and experts, by the dispatcher that the rules name."""
    axes, rules = _Axes.of(x, placement), placement.rules
    is_sent = rules.expert_dispatch != "dense" and axes.expert

    def share(x, expert_index, expert_weight, weights, layer):
        flat, index, weight = (a.reshape(-1, a.shape[-1]) for a in (x, expert_index, expert_weight))
        if is_sent:
            y = _sent(flat, index, weight, weights, layer, axes, rules)
        else:
            y = _dense(flat, index, weight, weights, layer, axes)
        return y.reshape(x.shape)

    spec, tokens = placement.spec, placement.spec(*placement.of_tokens(x))
    into, out = spec(None, "expert", "embed", "mlp"), spec(None, "expert", "mlp", "embed")
    return jax.shard_map(
        share,
        mesh=placement.mesh,
        in_specs=(tokens, tokens, tokens, (into, into, out), spec()),
        out_specs=tokens,
        check_vma=False,  # a kernel does not say over which axes its results vary
    )(x, expert_index, expert_weight, weights, layer)


def count_dropped(
    expert_index: Int[Array, "B T A"], num_experts: int, placement: Placement
) -> Int[Array, ""]:
    """How many of a layer's (token, expert) pairs `apply_on_mesh` leaves out, on all devices."""
    axes, capacity = _Axes.of(expert_index, placement), placement.rules.expert_capacity
    if not axes.expert:  # nothing is sent
        return jnp.zeros((), jnp.int32)
    num_devices = placement.num_shards("expert")
    own_experts = num_experts // num_devices

    def share(expert_index):
        flat = expert_index.reshape(-1, expert_index.shape[-1])
        if axes.replicated:
            (flat,) = _own_part((flat,), axes.replicated)
        room = expert_exchange.padded_room(flat.shape, own_experts, num_devices, capacity)
        counts = expert_exchange.padded_counts(flat.reshape(-1), own_experts, num_devices)
        dropped = jnp.maximum(counts - room, 0).sum()
        over = axes.tokens + axes.replicated
        return jax.lax.psum(dropped, over) if over else dropped

    tokens = placement.spec(*placement.of_tokens(expert_index))
    return jax.shard_map(
        share, mesh=placement.mesh, in_specs=tokens, out_specs=placement.spec(), check_vma=False
    )(expert_index)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes: those that split tokens; that split experts, and of them those that do and do not
    split tokens as well; and those that split the width of each expert, and its inputs."""

    tokens: tuple[str, ...]
    expert: tuple[str, ...]
    gathered: tuple[str, ...]
    replicated: tuple[str, ...]
    width: tuple[str, ...]
    embed: tuple[str, ...]

    @classmethod
    def of(cls, x: Array, placement: Placement) -> _Axes:
        """Of the mesh, and of tokens x[B, T, ...] on it."""
        split = [name for name in placement.of_tokens(x) if name]
        tokens = tuple(axis for name in split for axis in placement.axes(name))
        expert = placement.axes("expert")
        return cls(
            tokens=tokens,
            expert=expert,
            gathered=tuple(axis for axis in expert if axis in tokens),
            replicated=tuple(axis for axis in expert if axis not in tokens),
            width=placement.axes("mlp"),
            embed=placement.axes("embed"),
        )


def _dense(x, expert_index, expert_weight, weights, layer, axes: _Axes):
    """Gathers the tokens of all devices that split the experts, and adds up their results."""
    if axes.gathered:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes.gathered, axis=0, tiled=True)
        x, expert_index, expert_weight = gather(x), gather(expert_index), gather(expert_weight)
    first = _rank(axes.expert) * weights[0].shape[1]
    y = apply_local(x, expert_index - first, expert_weight, weights, layer, axes.embed)
    if axes.replicated + axes.width:
        y = jax.lax.psum(y, axes.replicated + axes.width)
    if axes.gathered:
        y = jax.lax.psum_scatter(y, axes.gathered, scatter_dimension=0, tiled=True)
    return y


def _sent(x, expert_index, expert_weight, weights, layer, axes: _Axes, rules: ShardingRules):
    """Sends every token to the devices of its experts and the results back."""
    num_tokens = x.shape[0]
    if axes.replicated:  # devices with equal tokens take a part of them each
        x, expert_index, expert_weight = _own_part(
            (x, expert_index, expert_weight), axes.replicated
        )

    def run(rows, expert):
        return _run(rows, jnp.arange(len(rows)), expert, weights, layer, axes.embed)

    arguments = x, expert_index, weights[0].shape[1], run, axes.expert
    if rules.expert_dispatch == "ragged":
        rows = expert_exchange.ragged(*arguments)
    else:
        rows = expert_exchange.padded(*arguments, rules.expert_capacity)

    y = _combine(rows.reshape(*expert_index.shape, x.shape[1]), expert_weight)
    if axes.width:
        y = jax.lax.psum(y, axes.width)
    if axes.replicated:
        y = jax.lax.all_gather(y, axes.replicated, axis=0, tiled=True)[:num_tokens]
    return y


def _own_part(arrays, axes):
    """This device's share of arrays that all devices along `axes` hold; padded to equal parts."""
    parts = math.prod(jax.lax.axis_size(axis) for axis in axes)
    M = arrays[0].shape[0]
    size = -(-M // parts)

    def cut(array):
        # Padding gets the index -1: it goes nowhere.
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        padded = jnp.pad(array, ((0, size * parts - M), (0, 0)), constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(padded, _rank(axes) * size, size)

    return tuple(cut(array) for array in arrays)


def _rank(axes: tuple[str, ...]) -> int | Array:
    return jax.lax.axis_index(axes) if axes else 0


def _run(x, source, expert, weights: Weights, layer, embed_axes: tuple[str, ...]) -> Array:
    """Row m is expert[m] applied to x[source[m]], and 0 where the expert is not one of these."""
    if embed_axes:  # of a pool, only this layer is gathered
        weights = jax.tree.map(lambda w: jax.lax.dynamic_slice_in_dim(w, layer, 1), weights)
        layer = 0
    num_layers, num_experts = weights[0].shape[:2]
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert)
    group_sizes = jnp.bincount(expert, length=num_experts)

    # The backward pass gathers once more; where it computes the layer again, only once for both.
    @functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
    def multiply(rows, w, axis):
        if embed_axes:
            w = jax.lax.all_gather(w, embed_axes, axis=axis, tiled=True)
        w = w.reshape(num_layers * num_experts, *w.shape[2:]).astype(rows.dtype)
        return grouped_matmul(rows, w, group_sizes, first_group=layer * num_experts)

    rows, (gate, up, down) = x[source[order]], weights
    rows = multiply(jax.nn.silu(multiply(rows, gate, 2)) * multiply(rows, up, 2), down, 3)
    return rows[jnp.argsort(order)]


@jax.checkpoint  # keeps the outputs in their own dtype for the backward pass, not in float32
def _combine(by_token: Float[Array, "M A D"], weights: Float[Array, "M A"]) -> Float[Array, "M D"]:
    """Each token's expert outputs, weighted and added in float32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("MAD,MA->MD", by_token.astype(jnp.float32), weights, precision=highest)
