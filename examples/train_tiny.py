"""Trains the bundled model's architecture on bytes of text; see jax_mla/demo/README.md.

python examples/train_tiny.py                                      # a few steps on a laptop
python examples/train_tiny.py --text train.txt --steps 2200 --batch 12 --length 256 --out model
"""

import argparse
import functools
import pathlib
import time

import jax
import numpy as np
import optax

import jax_mla
from jax_mla.training import next_token_loss, update_router_bias

HELD_OUT = pathlib.Path(jax_mla.__file__).parent / "demo" / "held_out.txt"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--text", type=pathlib.Path, default=HELD_OUT)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=64)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder to save the trained model in")
args, config = parser.parse_args(), jax_mla.tiny()


def read(path):
    """Every paragraph between its two marks, as one long run of byte ids."""
    begin, (end, *_) = config.bos_token_id, config.eos_token_id
    return np.concatenate([[begin, *text, end] for text in path.read_bytes().split(b"\n\n")])


def windows(ids, starts):
    return ids[starts[:, None] + np.arange(args.length)[None, :]].astype(np.int32)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, tokens):
    def loss_of(params):
        result = next_token_loss(params, config, tokens)
        return result.loss, result.load

    (loss, load), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state, params)
    return update_router_bias(optax.apply_updates(params, updates), load, 0.001), state, loss


def narrow(path, x):  # the router's bias stays float32, as in published checkpoints
    return x if path[-1].key == "e_score_correction_bias" else x.astype("bfloat16")


peak, warmup = args.learning_rate, max(args.steps // 20, 1)
schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, args.steps, 1e-5)
adam = optax.adamw(schedule, b2=0.98, weight_decay=0.01)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)
train, test, rng = read(args.text), read(HELD_OUT), np.random.default_rng(args.seed)
params = jax_mla.init(jax.random.key(args.seed), config)
state, began = optimizer.init(params), time.time()
for step in range(args.steps):
    tokens = windows(train, rng.integers(len(train) - args.length, size=args.batch))
    params, state, loss = train_step(params, state, tokens)
    if step % max(args.steps // 60, 1) == 0 or step == args.steps - 1:
        rate = (step + 1) * tokens.size / (time.time() - began)
        print(f"step {step:5d}  {loss / np.log(2):.3f} bits/byte  {rate:.0f} tokens/s", flush=True)
bits = jax.jit(lambda params, tokens: next_token_loss(params, config, tokens).loss / np.log(2))
starts = np.arange(0, len(test) - args.length, args.length)
starts = starts[: len(starts) // 12 * 12].reshape(-1, 12)
held_out = np.mean([bits(params, windows(test, some)) for some in starts])
print(f"held out: {held_out:.4f} bits/byte over {starts.size} windows of {args.length}")
if args.out:
    saved = jax.tree_util.tree_map_with_path(narrow, params)
    jax_mla.save(args.out, saved, config, max_shard_bytes=4_000_000)
