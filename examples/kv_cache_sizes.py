"""Bytes that one token takes in the cache: multi-head, grouped, multi-query and latent attention.

python examples/kv_cache_sizes.py                       # the table
python examples/kv_cache_sizes.py --plot sizes.png      # and a picture; needs the `plot` extra
"""

import argparse

import jax_mla

CONFIGS = {
    "DeepSeek-V2-Lite": jax_mla.v2_lite(),
    "DeepSeek-V2": jax_mla.v2(),
    "DeepSeek-V3": jax_mla.v3(),
    "Kimi-K2": jax_mla.kimi_k2(),
}


def bytes_per_token(config):
    """bfloat16, all layers; every head keeps a key of P + R and a value of H numbers."""
    head = config.qk_head_dim + config.v_head_dim
    numbers = {
        "MHA": config.num_attention_heads * head,
        "GQA, 8 groups": 8 * head,
        "MQA": head,
        "MLA": config.kv_lora_rank + config.qk_rope_head_dim,
    }
    return {name: 2 * config.num_hidden_layers * count for name, count in numbers.items()}


def plot(sizes, file):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    kinds = list(next(iter(sizes.values())))
    for i, kind in enumerate(kinds):
        bars = [by_kind[kind] / 1000 for by_kind in sizes.values()]
        axes.bar([x + 0.2 * i for x in range(len(sizes))], bars, 0.2, label=kind)
    axes.set_xticks([x + 0.3 for x in range(len(sizes))], list(sizes))
    axes.set(yscale="log", ylabel="kB a token, all layers, bfloat16", title="Cache of one token")
    axes.legend()
    figure.savefig(file, dpi=150)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--plot", metavar="FILE", help="write a bar chart")
args = parser.parse_args()
sizes = {name: bytes_per_token(config) for name, config in CONFIGS.items()}
print(f"{'bytes a token, bfloat16':<26}" + "".join(f"{kind:>15}" for kind in sizes["DeepSeek-V3"]))
for name, by_kind in sizes.items():
    print(f"{name:<26}" + "".join(f"{size:>15,}" for size in by_kind.values()))
v3 = sizes["DeepSeek-V3"]
mha_gb, mla_gb = (131072 * v3[kind] / 1e9 for kind in ("MHA", "MLA"))
print(f"\n128k tokens of DeepSeek-V3: {mha_gb:.0f} GB with MHA, {mla_gb:.1f} GB with MLA")
if args.plot:
    plot(sizes, args.plot)
