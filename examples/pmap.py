"""Data parallelism twice: with `jax.pmap`, and with `jax.jit` over sharded arrays. Equal numbers.

Prefer the second: the function is written for the whole batch and knows nothing of devices, the
compiler adds the all-reduce, and any other layout is another `ShardingRules`. `pmap` needs arrays
with a leading device axis, a copy of the parameters for each, and its own `pmean`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jax_mla
from jax_mla.sharding import layouts
from jax_mla.training import next_token_loss

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # read when the first array is made

config = dataclasses.replace(jax_mla.tiny(), num_hidden_layers=2)
params = jax_mla.init(jax.random.key(0), config)
tokens = jax.random.randint(jax.random.key(1), (16, 33), 0, 256)


def loss(params, tokens, layout=None):
    return next_token_loss(params, config, tokens, rules=layout).loss


def descend(params, gradients):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)


def pmap_step(params, tokens):
    value, gradients = jax.lax.pmean(jax.value_and_grad(loss)(params, tokens), "data")
    return value, descend(params, gradients)


copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), params)
value, copies = jax.pmap(pmap_step, axis_name="data")(copies, tokens.reshape(8, 2, 33))
print(f"pmap: loss {value[0]:.6f}, norm {copies['norm']['weight'].shape}: a copy for each device")


@jax.jit
def jit_step(params, tokens):
    value, gradients = jax.value_and_grad(loss)(params, tokens, layouts.ddp())
    return value, descend(params, gradients)


mesh = jax_mla.make_mesh(data=8)
placed = jax.device_put(params, jax_mla.param_shardings(config, mesh, layouts.ddp()))
value, placed = jit_step(placed, jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data"))))
print(f"jit:  loss {value:.6f}, norm {placed['norm']['weight'].shape} on every device")

pairs = zip(jax.tree.leaves(copies), jax.tree.leaves(placed), strict=True)
worst = max(np.abs(a[0] - np.asarray(b)).max() for a, b in pairs)
print(f"largest difference of a parameter after the step: {worst:.1e}")
