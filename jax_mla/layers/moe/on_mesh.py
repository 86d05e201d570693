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
        share = _Share.of(flat, axes.replicated, capacity)
        (flat,) = share.take((flat,))
        limit = exchange.admitted(share.num_tokens, flat.shape, num_devices, capacity)
        counts = exchange.padded_counts(flat.reshape(-1), own_experts, num_devices)
        dropped = jnp.maximum(counts - limit, 0).sum()
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
    share = _Share.of(expert_index, axes.replicated, dispatch.capacity)
    x, expert_index, expert_weight = share.take((x, expert_index, expert_weight))

    def run(rows, expert):
        return apply_experts(rows, jnp.arange(len(rows)), expert, pools, layer, axes.embed)

    arguments = x, expert_index, pools[0].num_experts, run, axes.expert
    if dispatch.method == "ragged":
        rows = exchange.ragged(*arguments)
    else:
        rows = exchange.padded(*arguments, dispatch.capacity, share.num_tokens)

    y = combine(rows.reshape(*expert_index.shape, x.shape[1]), expert_weight)
    if axes.width:
        y = jax.lax.psum(y, axes.width)
    return share.give_back(y)


@dataclasses.dataclass(frozen=True)
class _Share:
    """A device's part of the tokens that it and others hold: equally many for each, in order.

    With a capacity padding is in no part, so that it does not change which device sends a token.

    Attributes:
      axes: over which the tokens are replicated; with none the part is all of them.
      size: tokens in all, padding included.
      num_tokens: in this part, the last of which may be padding.
      order: tokens in the order of the parts, padding last; None leaves them as they are.
    """

    axes: tuple[str, ...]
    size: int
    num_tokens: int | Int[Array, ""]
    order: Int[Array, " M"] | None

    @classmethod
    def of(
        cls, expert_index: Int[Array, "M A"], axes: tuple[str, ...], capacity: float | int | None
    ) -> _Share:
        whole = cls(axes, len(expert_index), 0, None)
        if capacity is None:
            return dataclasses.replace(whole, num_tokens=whole.room)
        is_padding = (expert_index < 0).all(axis=1)
        num_tokens = -(-jnp.sum(~is_padding, dtype=jnp.int32) // whole.parts)
        order = jnp.argsort(is_padding) if axes else None
        return dataclasses.replace(whole, num_tokens=num_tokens, order=order)

    @property
    def parts(self) -> int:
        return math.prod(map(jax.lax.axis_size, self.axes))

    @property
    def room(self) -> int:
        """For the tokens of a part; it is filled up with padding."""
        return -(-self.size // self.parts)

    def take(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """This device's part of arrays [M, ...] of all tokens."""
        return tuple(map(self._take, arrays)) if self.axes else arrays

    def _take(self, array: Array) -> Array:
        # Padding gets the index -1: it goes nowhere.
        fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
        array = array if self.order is None else array[self.order]
        missing = self.room * self.parts - self.size
        array = jnp.pad(array, ((0, missing), (0, 0)), constant_values=fill)
        first = _rank(self.axes) * self.num_tokens
        part = jax.lax.dynamic_slice_in_dim(array, first, self.room)
        if self.order is None:
            return part
        return jnp.where(jnp.arange(self.room)[:, None] < self.num_tokens, part, fill)

    def give_back(self, part: Float[Array, "room D"]) -> Float[Array, "M D"]:
        """The results of all tokens, from each device's part."""
        if not self.axes:
            return part
        parts = jax.lax.all_gather(part, self.axes, axis=0, tiled=True)
        if self.order is None:
            return parts[: self.size]
        num_tokens = jnp.maximum(self.num_tokens, 1)
        place = jnp.argsort(self.order)  # of every token, in the order of the parts
        row = place // num_tokens * self.room + place % num_tokens
        return parts.at[row].get(mode="fill", fill_value=0)


def _rank(axes: tuple[str, ...]) -> int | Array:
    return jax.lax.axis_index(axes) if axes else 0
