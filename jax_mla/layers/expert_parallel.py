"""Routed experts as functions of arrays: on one device, and over the mesh axes that split experts.

Under a mesh the functions run inside of shard_map, on a device's own tokens and experts. `dense`
lets every device see all tokens and apply its own experts to them; `a2a` sends each token only to
the devices that own its experts. Both equal the layer on one device, and no token is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_mla.sharding import Placement
from pallas_kernels import grouped_matmul

# gate_proj, up_proj and down_proj of all experts of one layer or of a pool of layers.
Weights = tuple[Float[Array, "L E D F"], Float[Array, "L E D F"], Float[Array, "L E F D"]]


def apply_local(
    x: Float[Array, "M D"],
    expert_index: Int[Array, "M A"],
    expert_weight: Float[Array, "M A"],
    weights: Weights,
    layer: int | Int[Array, ""],
) -> Float[Array, "M D"]:
    """sum_a expert_weight[m, a] * expert[expert_index[m, a]](x[m]), float32.

    An index outside of 0 to E - 1 adds nothing.
    """
    active = expert_index.shape[1]
    source = jnp.arange(expert_index.size) // active
    rows = _run(x, source, expert_index.reshape(-1), weights, layer)
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
    dispatch = {"dense": _dense, "a2a": _all_to_all}[placement.rules.expert_dispatch]

    logical = placement.of_tokens(x)
    split = {axis for name in logical if name for axis in placement.axes(name)}
    axes = _Axes(
        expert=placement.axes("expert"),
        gathered=tuple(axis for axis in placement.axes("expert") if axis in split),
        replicated=tuple(axis for axis in placement.axes("expert") if axis not in split),
        width=placement.axes("mlp"),
    )

    def share(x, expert_index, expert_weight, weights, layer):
        flat, index, weight = (a.reshape(-1, a.shape[-1]) for a in (x, expert_index, expert_weight))
        return dispatch(flat, index, weight, weights, layer, axes).reshape(x.shape)

    spec, tokens = placement.spec, placement.spec(*logical)
    into, out = spec(None, "expert", None, "mlp"), spec(None, "expert", "mlp", None)
    return jax.shard_map(
        share,
        mesh=placement.mesh,
        in_specs=(tokens, tokens, tokens, (into, into, out), spec()),
        out_specs=tokens,
        check_vma=False,  # a kernel does not say over which axes its results vary
    )(x, expert_index, expert_weight, weights, layer)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes: those that split experts, of them those that do and do not split tokens as well;
    and those that split the width of each expert."""

    expert: tuple[str, ...]
    gathered: tuple[str, ...]
    replicated: tuple[str, ...]
    width: tuple[str, ...]


def _dense(x, expert_index, expert_weight, weights, layer, axes: _Axes):
    """Gathers the tokens of all devices that split the experts, and adds up their results."""
    if axes.gathered:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes.gathered, axis=0, tiled=True)
        x, expert_index, expert_weight = gather(x), gather(expert_index), gather(expert_weight)
    first = _rank(axes.expert) * weights[0].shape[1]
    y = apply_local(x, expert_index - first, expert_weight, weights, layer)
    if axes.replicated + axes.width:
        y = jax.lax.psum(y, axes.replicated + axes.width)
    if axes.gathered:
        y = jax.lax.psum_scatter(y, axes.gathered, scatter_dimension=0, tiled=True)
    return y


def _all_to_all(x, expert_index, expert_weight, weights, layer, axes: _Axes):
    """Sends every token to the devices of its experts and the results back.

    Buffers are padded to what one device may send to another if all of its tokens go there, so
    that nothing is ever dropped: min(A, E / devices) rows a token.
    """
    if not axes.expert:
        return _dense(x, expert_index, expert_weight, weights, layer, axes)
    num_tokens = x.shape[0]
    if axes.replicated:  # devices with equal tokens take a part of them each
        x, expert_index, expert_weight = _own_part(
            (x, expert_index, expert_weight), axes.replicated
        )
    num_devices, own_experts = jax.lax.axis_size(axes.expert), weights[0].shape[1]
    (M, A), width = expert_index.shape, x.shape[1]
    room = M * min(A, own_experts)  # the experts of a token are distinct

    expert = expert_index.reshape(-1)
    to = jnp.where(expert < 0, num_devices, expert // own_experts)
    order = jnp.argsort(to)
    counts = jnp.bincount(to, length=num_devices)
    place = (
        jnp.arange(M * A) - (jnp.cumsum(counts) - counts)[jnp.minimum(to[order], len(counts) - 1)]
    )
    slot = jnp.zeros_like(to).at[order].set(place) + to * room

    def exchange(rows):
        rows = rows.reshape(num_devices, room, *rows.shape[1:])
        rows = jax.lax.all_to_all(rows, axes.expert, split_axis=0, concat_axis=0)
        return rows.reshape(num_devices * room, *rows.shape[2:])

    sent = jnp.zeros((num_devices * room, width), x.dtype)
    sent = exchange(sent.at[slot].set(x[jnp.arange(M * A) // A], mode="drop"))
    own = jnp.full(num_devices * room, own_experts, jnp.int32)
    own = exchange(own.at[slot].set(expert % own_experts, mode="drop"))
    rows = exchange(_run(sent, jnp.arange(len(own)), own, weights, layer))
    rows = rows.at[slot].get(mode="fill", fill_value=0)

    y = _combine(rows.reshape(M, A, width), expert_weight)
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


def _run(x, source, expert, weights: Weights, layer) -> Array:
    """Row m is expert[m] applied to x[source[m]], and 0 where the expert is not one of these."""
    num_layers, num_experts = weights[0].shape[:2]
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
    order = jnp.argsort(expert)
    group_sizes = jnp.bincount(expert, length=num_experts)

    def multiply(rows, w):
        w = w.reshape(num_layers * num_experts, *w.shape[2:]).astype(rows.dtype)
        return grouped_matmul(rows, w, group_sizes, first_group=layer * num_experts)

    rows, (gate, up, down) = x[source[order]], weights
    rows = multiply(jax.nn.silu(multiply(rows, gate)) * multiply(rows, up), down)
    return rows[jnp.argsort(order)]


@jax.checkpoint  # keeps the outputs in their own dtype for the backward pass, not in float32
def _combine(by_token: Float[Array, "M A D"], weights: Float[Array, "M A"]) -> Float[Array, "M D"]:
    """Each token's expert outputs, weighted and added in float32."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("MAD,MA->MD", by_token.astype(jnp.float32), weights, precision=highest)
