"""The same forward pass and loss under six layouts, on eight virtual devices of a CPU.

Prints where the parameters lie, what the loss sends between devices (gradients would send more),
and that it is the same.
"""

import dataclasses

import jax

import jax_mla
from jax_mla.sharding import layouts
from jax_mla.training import next_token_loss

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # read when the first array is made

LAYOUTS = {
    "DP": ({"data": 8}, layouts.ddp()),
    "TP": ({"tensor": 2}, layouts.tensor_parallel()),
    "DP x TP": ({"data": 4, "tensor": 2}, layouts.tensor_parallel()),
    "FSDP (ZeRO-3)": ({"data": 8}, layouts.zero3()),
    "EP, attention DP": ({"expert": 8}, layouts.dp_attention_ep()),
    "context parallel": ({"sequence": 8}, jax_mla.ShardingRules()),
}


def main():
    config = dataclasses.replace(jax_mla.tiny(), num_hidden_layers=2)
    params = jax_mla.init(jax.random.key(0), config)
    tokens = jax.random.randint(jax.random.key(1), (8, 64), 0, 256)
    print(f"{'one device':18} loss {next_token_loss(params, config, tokens).loss:.6f}")

    for name, (sizes, layout) in LAYOUTS.items():
        mesh = jax_mla.make_mesh(**sizes)
        placed = jax.device_put(params, jax_mla.param_shardings(config, mesh, layout))
        loss = jax.jit(
            lambda p, layout=layout: next_token_loss(p, config, tokens, rules=layout).loss
        )
        compiled = loss.lower(placed).compile()
        rows, _ = jax_mla.explain_sharding(placed, config)
        sent, _ = jax_mla.explain_collectives(compiled)
        kinds = ", ".join(sorted({row.kind for row in sent})) or "nothing"
        print(
            f"{name:18} loss {compiled(placed):.6f}; a device holds "
            f"{sum(row.bytes_per_device for row in rows) / 1e6:5.2f} MB of parameters and sends "
            f"{sum(row.bytes_per_device for row in sent) / 1e6:5.2f} MB: {kinds}"
        )

    print("\nTensor parallelism, tensor by tensor:")
    mesh = jax_mla.make_mesh(tensor=2)
    layout = layouts.tensor_parallel()
    placed = jax.device_put(params, jax_mla.param_shardings(config, mesh, layout))
    print(jax_mla.explain_sharding(placed, config)[1])


if __name__ == "__main__":
    main()
