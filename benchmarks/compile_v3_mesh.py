"""DeepSeek-V3 at its real size for 64 H200s, compiled without one: bytes and collectives.

python benchmarks/compile_v3_mesh.py                  # needs the `aot` extra and JAX >= 0.11
python benchmarks/compile_v3_mesh.py --platform cpu   # 64 virtual devices: layout, no GPU code
python benchmarks/compile_v3_mesh.py --write benchmarks/results/v3_mesh.md

No array is ever made: programs are lowered and compiled from shapes. Each program has a process of
its own, so that one that fails is reported and the others still run.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
HOSTS, DEVICES, GB = 8, 64, 1e9
NOTES = "<!-- notes -->"  # what follows it in the page is not ours
TRAINING = (
    "64 rows of 4,096 tokens, computed in bfloat16, blocks recomputed in the backward pass; "
    "matrices split over fsdp=8, experts over expert=8 too, tokens over both and sent by `a2a`, "
)
PROGRAMS = {
    "decode": "1,024 sequences, caches of 16,384 tokens; `dp_attention_ep` on expert=64: 16 "
    "sequences and 4 experts of every layer a device",
    "train-float32": f"{TRAINING}dropless; weights, AdamW's moments and gradients in float32",
    "train-bfloat16": f"{TRAINING}dropless; weights, moments and gradients in bfloat16",
    "train-capacity": f"{TRAINING}with a capacity of 1.5; in bfloat16 as before",
    "train-ragged": f"{TRAINING.replace('a2a', 'ragged')}dropless; in bfloat16 as before",
}


def main():
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, default=61, help="fewer, to try the program")
    parser.add_argument("--write", type=pathlib.Path, help="file of the table, in Markdown")
    parser.add_argument("--only", choices=PROGRAMS, help="in this process, printed as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(compile_one(args.only, args.platform, args.layers)))
        return
    options = ["--platform", args.platform, "--layers", str(args.layers)]
    results = {name: in_a_process(name, options) for name in PROGRAMS}
    page = as_markdown(results, args.platform, args.layers)
    print(page)
    if args.write:
        # What a person wrote below the mark stays.
        old = args.write.read_text() if args.write.exists() else ""
        args.write.write_text(page + old[old.index(NOTES) :] if NOTES in old else page)


def in_a_process(name, options):
    """What `--only name` prints, or the last line of what went wrong."""
    words = [sys.executable, __file__, "--only", name, *options]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return {"error": lines[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def compile_one(name, platform, num_layers):
    """Compiles one program for the mesh; figures of one device."""
    with devices_of(platform) as devices:
        import jax

        import jax_mla

        config = dataclasses.replace(jax_mla.v3(), num_hidden_layers=num_layers)
        lower = lower_decode if name == "decode" else lower_training
        began = time.perf_counter()
        lowered, held = lower(config, devices, name)
        lowering = time.perf_counter() - began
        compiled = lowered.compile()
        seconds = time.perf_counter() - began - lowering
    memory = compiled.memory_analysis()
    text = compiled.as_text() or ""
    rows, _ = jax_mla.explain_collectives(compiled)
    kinds = sorted({row.kind for row in rows})
    return {
        "jax": jax.__version__,
        "held_bytes": held,
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "kernels": text.count('custom_call_target="mosaic_gpu'),
        "collectives": {
            kind: [
                sum(row.calls for row in rows if row.kind == kind),
                sum(row.bytes_per_device for row in rows if row.kind == kind),
            ]
            for kind in kinds
        },
        "largest": [
            [row.kind, row.shape[:60], row.calls, row.bytes_per_device] for row in rows[:12]
        ],
        "lowering_seconds": lowering,
        "compile_seconds": seconds,
    }


@contextlib.contextmanager
def devices_of(platform):
    """64 devices to compile for; kernels are chosen as on the first of them."""
    import jax

    if platform == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES)
        yield jax.devices()
        return
    from kernel_tools import aot

    jax.config.update("jax_platforms", "cpu")
    if reason := aot.why_not():
        raise SystemExit(f"cannot compile for a GPU: {reason}")

    from pallas_kernels import hardware

    devices = aot.h200_devices(DEVICES, hosts=HOSTS)
    with mock.patch.object(hardware, "_device", lambda device: device or devices[0]):
        yield devices


def lower_decode(config, devices, _):
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    import jax_mla
    from jax_mla.sharding import layouts as published
    from jax_mla.sharding.placement import partition_spec

    mesh, rules = jax_mla.make_mesh(expert=DEVICES, devices=devices), published.dp_attention_ep()
    batch, tokens = 1024, 16_384
    of_batch = partition_spec(rules, ("batch",))[0]
    params = placed(
        jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config)),
        jax_mla.param_shardings(config, mesh, rules),
    )
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim == 4), of_batch)),
        ),
        jax.eval_shape(lambda: jax_mla.LatentCache.empty(config, batch, tokens)),
    )
    token = jax.ShapeDtypeStruct(
        (batch,), "int32", sharding=NamedSharding(mesh, PartitionSpec(of_batch))
    )

    def step(params, token, cache):
        return jax_mla.decode_step(params, config, token, cache, rules=rules)

    held = {"weights": bytes_a_device(params), "cache": bytes_a_device(cache)}
    return jax.jit(step, donate_argnums=2).lower(params, token, cache), held


def lower_training(config, devices, name):
    import jax
    from jax.sharding import NamedSharding

    import jax_mla
    from jax_mla.sharding import ExpertDispatch
    from jax_mla.sharding.placement import partition_spec
    from jax_mla.training import Batch, Precision, Recipe, abstract_state, train_step

    mesh = jax_mla.make_mesh(fsdp=8, expert=8, devices=devices)
    rules = jax_mla.ShardingRules(
        vocab=None,
        heads=None,
        mlp=None,
        batch=("data", "fsdp", "expert"),
        dispatch=ExpertDispatch("a2a"),
    )
    if name == "train-capacity":
        rules = dataclasses.replace(rules, dispatch=ExpertDispatch("a2a", capacity=1.5))
    if name == "train-ragged":
        rules = dataclasses.replace(rules, dispatch=ExpertDispatch("ragged"))
    wide = name == "train-float32"
    precision = Precision() if wide else Precision(param="bfloat16", reduce="bfloat16")
    recipe = Recipe(num_steps=1000, precision=precision, remat="full", balance_loss=1e-4)
    state = abstract_state(config, recipe=recipe, mesh=mesh, rules=rules)
    rows = NamedSharding(mesh, partition_spec(rules, ("batch", "sequence")))
    batch = Batch(jax.ShapeDtypeStruct((DEVICES, 4096), "int32", sharding=rows))
    held = {"weights": bytes_a_device(state.params), "moments": bytes_a_device(state.opt_state)}
    return train_step.lower(state, config, batch, recipe=recipe, mesh=mesh, rules=rules), held


def placed(shapes, shardings):
    import jax

    return jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings
    )


def bytes_a_device(tree):
    import math

    import jax

    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def as_markdown(results, platform, num_layers):
    where = "H200s (sm_90a, XLA's GPU compiler, no device)" if platform == "cuda" else "CPU devices"
    lines = [
        "# DeepSeek-V3 on an 8x8 mesh, compiled and not run",
        "",
        f"`python benchmarks/compile_v3_mesh.py --platform {platform}`: {num_layers} layers, 64 "
        f"{where}; GB = 1e9 bytes, of one device.",
        "",
        "| program | weights | cache or moments | temporary | all | collectives: calls, GB sent | "
        "calls of our kernels in the program | lowering s | compiling s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        if "error" in found:
            lines.append(f"| {name} | did not compile: {found['error']} |")
            continue
        weights, other = found["held_bytes"].values()
        whole = found["argument_bytes"] + found["temp_bytes"] + found["output_bytes"]
        sent = ", ".join(
            f"{kind} {calls:,}: {num_bytes / GB:.3f}"
            for kind, (calls, num_bytes) in found["collectives"].items()
        )
        sizes = (weights, other, found["temp_bytes"], whole)
        lines.append(
            f"| {name} | {' | '.join(f'{size / GB:.2f}' for size in sizes)} | {sent} | "
            f"{found['kernels']} | {found['lowering_seconds']:.0f} | "
            f"{found['compile_seconds']:.0f} |"
        )
    lines += ["", *(f"- {name}: {PROGRAMS[name]}." for name in results), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
