"""Routed experts on a mesh: shard_map around what one device computes.

`dense` lets every device see all tokens and apply its own experts to them; `a2a` and `ragged` send
each token only to the devices that own its experts, `a2a` in blocks padded to equal size. All equal
the layer on one device: no token is dropped, unless `a2a` is given a capacity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_mla.layers.moe import exchange
from jax_mla.layers.moe.experts import Pools, apply_experts, apply_local, combine
from jax_mla.layers.moe.router import Routing
from jax_mla.sharding.dispatch import ExpertDispatch
from jax_mla.sharding.placement import Placement


def apply_on_mesh(
    x: Float[Array, "B T D"],
    expert_index: Int[Array, "B T A"],
    expert_weight: Float[Array, "B T A"],
    pools: Pools,
    layer: int | Int[Array, ""],
    placement: Placement,
) -> Float[Array, "B T D"]:
    """`apply_local` of every device's tokens and experts, by the dispatcher that the rules name."""
    axes, dispatch = _Axes.of(x, placement), placement.rules.dispatch
    is_sent = dispatch.method != "dense" and axes.expert
    if is_sent and dispatch.method == "ragged":
        _check_ragged(placement)

    def on_device(x, expert_index, expert_weight, pools, layer):
        flat, index, weight = (a.reshape(-1, a.shape[-1]) for a in (x, expert_index, expert_weight))
        if is_sent:
            y = _sent(flat, index, weight, pools, layer, axes, dispatch)
        else:
            y = _dense(flat, index, weight, pools, layer, axes)
        return y.reshape(x.shape)

    spec, tokens = placement.spec, placement.spec(*placement.of_tokens(x))
    into, out = spec(None, "expert", "embed", "mlp"), spec(None, "expert", "mlp", "embed")
    return jax.shard_map(
        on_device,
        mesh=placement.mesh,
        in_specs=(tokens, tokens, tokens, (into, into, out), spec()),
        out_specs=tokens,
        check_vma=False,  # a kernel does not say over which axes its results vary
    )(x, expert_index, expert_weight, pools, layer)


def route_on_mesh(
    route: Callable[..., Routing], logits: Float[Array, "B T E"], placement: Placement
) -> Callable[..., Routing]:
    """`route` on every device's tokens: the compiler would gather all tokens for each top_k."""
    tokens = placement.spec(*placement.of_tokens(logits))
    return jax.shard_map(
        route, mesh=placement.mesh, in_specs=(tokens, placement.spec(None)), out_specs=tokens
    )


def _check_ragged(placement: Placement) -> None:
    device = placement.mesh.abstract_device  # None for a mesh of no particular devices
    if device is not None and device.platform == "cpu":
        raise NotImplementedError(
            "expert dispatch 'ragged' cannot run on platform 'cpu', where XLA has no "
            "ragged_all_to_all: use 'a2a' or 'dense'"
        )


def count_dropped(
    expert_index: Int[Array, "B T A"], num_experts: int, placement: Placement
) -> Int[Array, ""]:
    """The (token, expert) pairs of a layer that `apply_on_mesh` drops, on all devices together."""
    axes, capacity = _Axes.of(expert_index, placement), placement.rules.dispatch.capacity
    if not axes.expert:  # nothing is sent
        return jnp.zeros((), jnp.int32)
    num_devices = placement.num_shards("expert")
    own_experts = num_experts // num_devices

    def on_device(expert_index):
        flat = expert_index.reshape(-1, expert_index.shape[-1])
        if axes.replicated:
            (flat,) = _own_tokens((flat,), axes.replicated)
        room = exchange.padded_room(flat.shape, own_experts, num_devices, capacity)
        counts = exchange.padded_counts(flat.reshape(-1), own_experts, num_devices)
        dropped = jnp.maximum(counts - room, 0).sum()
        over = axes.tokens + axes.replicated
        return jax.lax.psum(dropped, over) if over else dropped

    tokens = placement.spec(*placement.of_tokens(expert_index))
    return jax.shard_map(
        on_device, mesh=placement.mesh, in_specs=tokens, out_specs=placement.spec(), check_vma=False
    )(expert_index)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes by what they shard.

    Attributes:
      tokens: axes that shard tokens.
      expert: axes that shard experts.
      gathered: expert axes that also shard tokens.
      replicated: expert axes that do not.
      width: axes that shard F.
      embed: axes that shard D.
    """

    tokens: tuple[str, ...]
    expert: tuple[str, ...]
    gathered: tuple[str, ...]
    replicated: tuple[str, ...]
    width: tuple[str, ...]
    embed: tuple[str, ...]

    @classmethod
    def of(cls, x: Array, placement: Placement) -> _Axes:
        """The axes of a mesh for tokens x[B, T, ...] on it."""
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


def _dense(x, expert_index, expert_weight, pools, layer, axes: _Axes) -> Float[Array, "tokens D"]:
    """Gathers the tokens of all devices that shard the experts, and adds up their results."""
    if axes.gathered:
        gather = functools.partial(jax.lax.all_gather, axis_name=axes.gathered, axis=0, tiled=True)
        x, expert_index, expert_weight = gather(x), gather(expert_index), gather(expert_weight)
    first = _rank(axes.expert) * pools[0].num_experts
    y = apply_local(x, expert_index - first, expert_weight, pools, layer, axes.embed)
    if axes.replicated + axes.width:
        y = jax.lax.psum(y, axes.replicated + axes.width)
    if axes.gathered:
        y = jax.lax.psum_scatter(y, axes.gathered, scatter_dimension=0, tiled=True)
    return y


def _sent(
    x, expert_index, expert_weight, pools, layer, axes: _Axes, dispatch: ExpertDispatch
) -> Float[Array, "tokens D"]:
    """Sends every token to the devices of its experts and the results back."""
    num_tokens = x.shape[0]
    if axes.replicated:  # devices with equal tokens take some of them each
        x, expert_index, expert_weight = _own_tokens(
            (x, expert_index, expert_weight), axes.replicated
        )

    def run(rows, expert):
        return apply_experts(rows, jnp.arange(len(rows)), expert, pools, layer, axes.embed)

    arguments = x, expert_index, pools[0].num_experts, run, axes.expert
    if dispatch.method == "ragged":
        rows = exchange.ragged(*arguments)
    else:
        rows = exchange.padded(*arguments, dispatch.capacity)

    y = combine(rows.reshape(*expert_index.shape, x.shape[1]), expert_weight)
    if axes.width:
        y = jax.lax.psum(y, axes.width)
    if axes.replicated:
        y = jax.lax.all_gather(y, axes.replicated, axis=0, tiled=True)[:num_tokens]
    return y


def _own_tokens(arrays, axes):
    """This device's rows of arrays replicated over `axes`, padded to equally many per device."""
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
