"""Trains the bundled model's architecture on bytes of text; see jax_mla/demo/README.md.

python examples/train_tiny.py                                      # a few steps on a laptop
python examples/train_tiny.py --devices 4                          # ZeRO-3 on virtual devices
python examples/train_tiny.py --text train.txt --steps 2200 --batch 12 --length 256 --out model
"""

import argparse
import pathlib

import jax
import numpy as np

import jax_mla
from jax_mla.training import Precision, Recipe, TokenRows, next_token_loss, train

HELD_OUT = pathlib.Path(jax_mla.__file__).parent / "demo" / "held_out.txt"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--text", type=pathlib.Path, default=HELD_OUT)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--devices", type=int, help="of a mesh that shares parameters and rows")
parser.add_argument("--out", help="folder to save the trained model in")
args, config, where = parser.parse_args(), jax_mla.tiny(), {}
if args.devices:
    jax.config.update("jax_num_cpu_devices", args.devices)  # without effect on GPUs
    where = {"mesh": jax_mla.make_mesh(data=args.devices), "rules": jax_mla.rules.zero3()}


def read(path):
    """Every paragraph between its two marks, as one long run of byte ids."""
    begin, (end, *_) = config.bos_token_id, config.eos_token_id
    paragraphs = path.read_bytes().split(b"\n\n")
    return np.concatenate([[begin, *text, end] for text in paragraphs]).astype(np.uint16)


def rows(ids, batch_rows):
    options = {"row_tokens": args.length, "vocab_size": config.vocab_size, "seed": args.seed}
    return TokenRows([ids], batch_rows=batch_rows, **options)


def show(report):
    if (report.step - 1) % max(args.steps // 60, 1) == 0 or report.step == args.steps:
        bits, speed = report.loss / np.log(2), report.tokens_per_second
        print(f"step {report.step:5d}  {bits:.3f} bits/byte  {speed:.0f} tokens/s", flush=True)


recipe = Recipe(
    num_steps=args.steps,
    learning_rate=args.learning_rate,
    final_learning_rate=1e-5,
    warmup_steps=max(args.steps // 20, 1),
    b2=0.98,
    weight_decay=0.01,
    precision=Precision(compute="float32"),
)
data = rows(read(args.text), args.batch)
params = train(config, recipe, data, seed=args.seed, on_step=show, **where).state.params
test = rows(read(HELD_OUT), args.batch)
batches = [test.batch(i).tokens for i in range(test.num_rows // args.batch)]
options = {"rules": where.get("rules")}
held_out = np.mean([next_token_loss(params, config, t, **options).loss for t in batches])
what = "trained on" if args.text == HELD_OUT else "held out"
print(f"{what}: {held_out / np.log(2):.4f} bits/byte over {len(batches) * args.batch} rows")
if args.out:  # the router's bias stays float32
    narrow = Precision(param="bfloat16").to_param(params)
    jax_mla.save(args.out, narrow, config, max_shard_bytes=4_000_000)
