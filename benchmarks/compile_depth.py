"""Time to trace and compile a V3-shaped model of tiny widths: 61 layers against 10.

python benchmarks/compile_depth.py
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

import jax_mla

WIDTHS = dict(
    dtype="float32", vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
    v_head_dim=4, n_routed_experts=16,
)  # fmt: skip


def seconds(num_layers):
    """Time to trace, lower and compile `forward` from scratch."""
    jax.clear_caches()
    config = dataclasses.replace(jax_mla.v3(), num_hidden_layers=num_layers, **WIDTHS)
    params = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    began = time.perf_counter()
    jax.jit(lambda p, t: jax_mla.forward(p, config, t)).lower(params, tokens).compile()
    return time.perf_counter() - began


seconds(4)  # loads what is loaded only once
times = {layers: sorted(seconds(layers) for _ in range(5))[2] for layers in (10, 61)}
print(f"median of 5, seconds by layers: {times}; ratio {times[61] / times[10]:.2f}")
