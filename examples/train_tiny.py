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
from jax_mla.sharding import layouts
from jax_mla.training import Precision, Recipe, TokenRows, next_token_loss, train

HELD_OUT = pathlib.Path(jax_mla.__file__).parent / "demo" / "held_out.txt"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--text", type=pathlib.Path, default=HELD_OUT)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--devices", type=int, help="shard parameters and rows over this many devices")
parser.add_argument("--out", help="folder to save the trained model in")
args, config, where = parser.parse_args(), jax_mla.tiny(), {}
if args.devices:
    jax.config.update("jax_num_cpu_devices", args.devices)  # without effect on GPUs
    where = {"mesh": jax_mla.make_mesh(data=args.devices), "rules": layouts.zero3()}


def rows(path):
    """Every paragraph between its two marks, as one long run of byte ids, cut into rows."""
    begin, (end, *_) = config.bos_token_id, config.eos_token_id
    paragraphs = path.read_bytes().split(b"\n\n")
    ids = np.concatenate([[begin, *text, end] for text in paragraphs]).astype(np.uint16)
    sizes = {"batch_rows": args.batch, "row_tokens": args.length}
    return TokenRows([ids], vocab_size=config.vocab_size, **sizes)


def show(report):
    if (report.step - 1) % max(args.steps // 60, 1) == 0 or report.step == args.steps:
        bits, speed = report.loss / np.log(2), report.tokens_per_second
        print(f"step {report.step:5d}  {bits:.3f} bits/byte  {speed:.0f} tokens/s", flush=True)


recipe = Recipe(
    num_steps=args.steps, learning_rate=3e-3, final_learning_rate=1e-5, b2=0.98, weight_decay=0.01,
    warmup_steps=max(args.steps // 20, 1), precision=Precision(compute="float32"),
)  # fmt: skip
params = train(config, recipe, rows(args.text), on_step=show, **where).state.params
test = rows(HELD_OUT)
batches = [test.batch(i).tokens for i in range(test.num_rows // args.batch)]
losses = [next_token_loss(params, config, t, rules=where.get("rules")).loss for t in batches]
what = "text that it trained on" if args.text == HELD_OUT else "held-out text"
print(f"{what}: {np.mean(losses) / np.log(2):.4f} bits/byte over {len(losses) * args.batch} rows")
if args.out:  # the router's bias stays float32
    narrow = Precision(param="bfloat16").to_param(params)
    jax_mla.save(args.out, narrow, config, max_shard_bytes=4_000_000)
