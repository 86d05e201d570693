"""Exchanges that send rows to the devices that own their experts, and back. Inside shard_map.

`padded` sends blocks of equal size, `ragged` only the rows that there are. The plain functions of
arrays below say which row goes where.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# apply(rows, expert): applies local expert `expert[m]` to row m; 0 for ids out of range.
ApplyExperts = Callable[[Float[Array, "rows D"], Int[Array, " rows"]], Float[Array, "rows D"]]


def padded(
    x: Float[Array, "M D"],
    expert_index: Int[Array, "M A"],
    own_experts: int,
    apply: ApplyExperts,
    axes: tuple[str, ...],
    capacity: float | int | None,
    num_tokens: int | Int[Array, ""],
) -> Float[Array, "M*A D"]:
    """Every token through each of its experts; 0 where a choice is dropped.

    Args:
      expert_index: negative for none.
      own_experts: on each of the devices along `axes`.
      capacity, num_tokens: see `padded_room` and `admitted`.
    """
    num_devices, active = jax.lax.axis_size(axes), expert_index.shape[1]
    room = padded_room(expert_index.shape, own_experts, num_devices, capacity)
    limit = admitted(num_tokens, expert_index.shape, num_devices, capacity)
    expert = expert_index.reshape(-1)
    slot = padded_slots(expert, own_experts, num_devices, room)
    slot = jnp.where(slot % room < limit, slot, num_devices * room)

    def exchange(rows):
        rows = rows.reshape(num_devices, room, *rows.shape[1:])
        rows = jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=0)
        return rows.reshape(num_devices * room, *rows.shape[2:])

    sent = jnp.zeros((num_devices * room, x.shape[1]), x.dtype)
    sent = exchange(sent.at[slot].set(x[jnp.arange(expert.size) // active], mode="drop"))
    own = jnp.full(num_devices * room, own_experts, jnp.int32)
    own = exchange(own.at[slot].set(expert % own_experts, mode="drop"))
    return exchange(apply(sent, own)).at[slot].get(mode="fill", fill_value=0)


def ragged(
    x: Float[Array, "M D"],
    expert_index: Int[Array, "M A"],
    own_experts: int,
    apply: ApplyExperts,
    axes: tuple[str, ...],
) -> Float[Array, "M*A D"]:
    """As `padded` without a capacity, but sends only rows that there are.

    What is received still needs room for all rows of all devices: num_devices times as many.
    """
    num_devices, rank = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    (M, A), num_experts = expert_index.shape, num_devices * own_experts
    expert = expert_index.reshape(-1)
    expert = jnp.where(expert < 0, num_experts, expert)  # sorted after the others, and not sent
    order = jnp.argsort(expert)
    by_expert = jax.lax.all_gather(jnp.bincount(expert, length=num_experts), axes)
    by_expert = by_expert.reshape(num_devices, num_devices, own_experts)

    def exchange(rows, counts, num_rows):
        into = jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, into, *ragged_sizes(counts, rank), axis_name=axes)

    counts, room = by_expert.sum(axis=-1), num_devices * M * min(A, own_experts)
    received = exchange(x[order // A], counts, room)
    rows = apply(received, received_experts(by_expert[:, rank], room))
    return exchange(rows, counts.T, M * A)[jnp.argsort(order)]


def padded_room(
    shape: tuple[int, ...], own_experts: int, num_devices: int, capacity: float | int | None
) -> int:
    """The room for what one device sends to another, for its expert_index of shape [M, A].

    Without a capacity as many rows as there can be: the experts of a token are distinct. Else no
    more than are `admitted` where no token is padding.
    """
    M, A = shape
    largest = M * min(A, own_experts)
    return largest if capacity is None else min(largest, math.ceil(capacity * M * A / num_devices))


def admitted(
    num_tokens: int | Int[Array, ""],
    shape: tuple[int, ...],
    num_devices: int,
    capacity: float | int | None,
) -> int | Int[Array, ""]:
    """Rows that one device may send to another: `capacity` times the mean, rounded up.

    Args:
      num_tokens: those of the device's M that are no padding, so that padding changes nothing.
      shape: of its expert_index, [M, A].
    """
    M, A = shape
    if capacity is None:
        return M * A
    # In float32, which a device would compute with, products that are whole numbers may not be.
    by_num_tokens = np.ceil(capacity * np.arange(M + 1) * A / num_devices)
    return jnp.asarray(np.minimum(by_num_tokens, M * A).astype(np.int32))[num_tokens]


def padded_counts(
    expert: Int[Array, " rows"], own_experts: int, num_devices: int
) -> Int[Array, " num_devices"]:
    """Rows for each device."""
    return jnp.bincount(_device_of(expert, own_experts, num_devices), length=num_devices)


def padded_slots(
    expert: Int[Array, " rows"], own_experts: int, num_devices: int, room: int | Int[Array, ""]
) -> Int[Array, " rows"]:
    """Slot of each row in a [num_devices, room] buffer; num_devices * room if its block is full.

    Rows for one device keep their order, so the last ones are dropped.
    """
    to = _device_of(expert, own_experts, num_devices)
    counts = padded_counts(expert, own_experts, num_devices)
    order = jnp.argsort(to)
    first = (jnp.cumsum(counts) - counts)[jnp.minimum(to[order], num_devices - 1)]
    place = jnp.zeros_like(to).at[order].set(jnp.arange(to.size, dtype=to.dtype) - first)
    fits = (to < num_devices) & (place < room)
    return jnp.where(fits, to * room + place, num_devices * room)


def _device_of(expert, own_experts, num_devices):
    """num_devices where there is none."""
    return jnp.where(expert < 0, num_devices, expert // own_experts)


class RaggedSizes(NamedTuple):
    """The last four arguments of `jax.lax.ragged_all_to_all`, for one device."""

    input_offsets: Int[Array, " num_devices"]
    send_sizes: Int[Array, " num_devices"]
    output_offsets: Int[Array, " num_devices"]
    recv_sizes: Int[Array, " num_devices"]


def ragged_sizes(
    counts: Int[Array, "num_devices num_devices"], rank: int | Int[Array, ""]
) -> RaggedSizes:
    """Offsets and sizes for device `rank`, when counts[s, d] rows go from s to d.

    Rows are sent in order of destination and received in order of source; the
    transposed counts send them back.
    """
    of_source = jnp.cumsum(counts, axis=1) - counts  # where rows for d begin in what s sends
    at_destination = jnp.cumsum(counts, axis=0) - counts  # and in what d receives
    return RaggedSizes(of_source[rank], counts[rank], at_destination[rank], counts[:, rank])


def received_experts(
    counts: Int[Array, "num_devices own_experts"], num_rows: int
) -> Int[Array, " num_rows"]:
    """Expert of each received row, sorted by source, then by expert; own_experts after the last.

    Args:
      counts: rows from each device for each expert here.
    """
    own_experts = counts.shape[1]
    ends = jnp.cumsum(counts.reshape(-1))
    run = jnp.searchsorted(ends, jnp.arange(num_rows), side="right")
    return jnp.where(run < ends.size, run % own_experts, own_experts)
