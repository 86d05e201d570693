"""FlashMLA's two calls, unchanged, on a paged cache of JAX arrays, checked by a plain softmax."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_mla import flash_mla_with_kvcache, get_mla_metadata

s_q, h_q, h_kv, d, dv, page = 2, 16, 1, 576, 512, 64
lengths = [700, 64, 0, 129]  # tokens in the cache; the third sequence has none
rng = np.random.default_rng(0)
num_pages = [-(-length // page) for length in lengths]

# Pages are in any order. Rows that no sequence uses hold NaN, unused table entries any number.
shuffled = iter(rng.permutation(32))
block_table = np.full((len(lengths), max(num_pages)), 2147480000, np.int32)
kvcache = np.full((32, page, h_kv, d), np.nan, np.float32)
for row, length in enumerate(lengths):
    for i in range(num_pages[row]):
        block_table[row, i] = next(shuffled)
        used = min(page, length - i * page)
        kvcache[block_table[row, i], :used] = rng.standard_normal((used, h_kv, d))
q = rng.standard_normal((len(lengths), s_q, h_q, d))

q, kvcache = jnp.asarray(q, jnp.bfloat16), jnp.asarray(kvcache, jnp.bfloat16)
block_table, cache_seqlens = jnp.asarray(block_table), jnp.asarray(lengths, jnp.int32)

# From here to the comment below, the lines are those of FlashMLA's README.
tile_scheduler_metadata, num_splits = get_mla_metadata(cache_seqlens, s_q * h_q // h_kv, h_kv)
o, lse = flash_mla_with_kvcache(
    q, kvcache, block_table, cache_seqlens, dv,
    tile_scheduler_metadata, num_splits, causal=True,
)  # fmt: skip
# Nothing else was changed.

q, kvcache, o, lse = (np.asarray(x, np.float64) for x in (q, kvcache, o, lse))
worst_o = worst_lse = 0.0
for row, length in enumerate(lengths):
    pages = np.asarray(block_table)[row, : num_pages[row]]
    keys = kvcache[pages].reshape(-1, d)[:length]
    for t in range(s_q):
        seen = keys[: length - (s_q - 1 - t)]
        if len(seen) == 0:  # FlashMLA's sentinels
            assert not o[row, t].any() and np.isposinf(lse[row, :, t]).all()
            continue
        weights = np.exp(q[row, t] @ seen.T * d**-0.5)
        total = weights.sum(axis=1, keepdims=True)
        worst_o = max(worst_o, np.abs(weights / total @ seen[:, :dv] - o[row, t]).max())
        worst_lse = max(worst_lse, np.abs(np.log(total[:, 0]) - lse[row, :, t]).max())

print(f"out {o.shape}, lse {lse.shape}, for sequences of {lengths} tokens")
print(f"largest difference from a softmax in float64: out {worst_o:.1e}, lse {worst_lse:.1e}")
assert worst_o < 2e-2 and worst_lse < 1e-3, "bfloat16 rounds the output to 3 digits"
