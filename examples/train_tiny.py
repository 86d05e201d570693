"""Trains the bundled model's architecture on bytes of text; see jax_mla/demo/README.md.

python examples/train_tiny.py                                      # 40 short steps on a laptop
python examples/train_tiny.py --text train.txt --steps 4000 --batch 8 --length 512 --out model
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
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--batch", type=int, default=4)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", help="folder to save the trained model in")
args = parser.parse_args()
config = jax_mla.tiny()


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


@jax.jit
def bits_per_byte(params, tokens):
    return next_token_loss(params, config, tokens).loss / np.log(2)


warmup = max(args.steps // 20, 1)
schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warmup, args.steps, 1e-5)
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
)
train, test = read(args.text), read(HELD_OUT)
test_starts = np.arange(0, len(test) - args.length, args.length)
rng = np.random.default_rng(args.seed)
params = jax_mla.init(jax.random.key(args.seed), config)
state, began = optimizer.init(params), time.time()
for step in range(args.steps):
    tokens = windows(train, rng.integers(len(train) - args.length, size=args.batch))
    params, state, loss = train_step(params, state, tokens)
    if step % max(args.steps // 40, 1) == 0 or step == args.steps - 1:
        speed = (step + 1) * tokens.size / (time.time() - began)
        print(
            f"step {step:5d}  {float(loss) / np.log(2):.3f} bits/byte  {speed:.0f} tokens/s",
            flush=True,
        )
held_out = np.mean([bits_per_byte(params, windows(test, s[None])) for s in test_starts])
print(f"held out: {held_out:.4f} bits/byte over {len(test_starts)} windows of {args.length}")
if args.out:
    jax_mla.save(args.out, jax.tree.map(lambda x: x.astype("bfloat16"), params), config)
