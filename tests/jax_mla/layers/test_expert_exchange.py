"""Which rows the devices of the experts send to each other, and where these arrive."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from jax_mla.layers.moe.exchange import padded_slots, ragged_sizes, received_experts


def numpy_ragged_all_to_all(operands, num_rows, counts):
    """What JAX's documentation says of it, for all devices at once."""
    n = len(operands)
    sizes = [jax.tree.map(np.asarray, jax.jit(ragged_sizes)(counts, r)) for r in range(n)]
    results = [np.full((num_rows, operands[0].shape[1]), -1) for _ in range(n)]
    for source, mine in enumerate(sizes):
        for to in range(n):
            begin, size = mine.input_offsets[to], mine.send_sizes[to]
            assert sizes[to].recv_sizes[source] == size
            at = mine.output_offsets[to]
            results[to][at : at + size] = operands[source][begin : begin + size]
    return results


@given(st_numpy.arrays(np.int32, (3, 3, 2), elements=st.integers(0, 3)))
def test_ragged_rows_arrive_by_source_and_expert_and_return(counts):
    n, _, own = counts.shape
    room = 3 * counts.size  # for all rows on one device

    def rows(pairs):
        of_pairs = [
            (s, d, e, i) for s, d in pairs for e in range(own) for i in range(counts[s, d, e])
        ]
        return np.asarray(of_pairs, int).reshape(-1, 4)

    sent = [rows((s, d) for d in range(n)) for s in range(n)]
    received = numpy_ragged_all_to_all(sent, room, counts.sum(-1))
    for d in range(n):
        want = rows((s, d) for s in range(n))
        np.testing.assert_array_equal(received[d][: len(want)], want)
        assert (received[d][len(want) :] == -1).all()
        expert = jax.jit(received_experts, static_argnums=1)(counts[:, d], room)
        np.testing.assert_array_equal(expert, [*want[:, 2], *[own] * (room - len(want))])
    returned = numpy_ragged_all_to_all(received, room, counts.sum(-1).T)
    for s in range(n):
        np.testing.assert_array_equal(returned[s][: len(sent[s])], sent[s])


@given(
    st.lists(st.integers(-1, 7), min_size=12, max_size=12),
    st.integers(1, 13),
    st.sampled_from([1, 2]),
)
def test_the_first_rows_for_a_device_find_room(expert, room, own):
    num_devices, seen, want = 8 // own, {}, []
    for e in expert:
        place = seen[e // own] = seen.get(e // own, -1) + 1
        fits = e >= 0 and place < room
        want.append(e // own * room + place if fits else num_devices * room)
    slots = jax.jit(padded_slots, static_argnums=(1, 2))
    np.testing.assert_array_equal(slots(jnp.asarray(expert), own, num_devices, room), want)
