"""Text from the bundled model: generation in one call, and the loop that it stands for."""

from pathlib import Path

import jax
import jax.numpy as jnp

import jax_mla
from jax_mla.text import complete, load_tokenizer

folder = Path(jax_mla.__file__).parent / "demo" / "model"
params, config = jax_mla.load(folder)
tokenizer = load_tokenizer(folder, config)

(out,) = complete(params, config, tokenizer, ["And it came to pass"], max_new_tokens=64)
print(out.prompt + out.text)


@jax.jit
def next_token(params, token, cache):
    logits, cache = jax_mla.decode_step(params, config, token, cache)
    return logits.argmax(axis=-1), cache


# The same by hand: the cache goes in and comes out, nothing is changed in place.
tokens = jnp.array([tokenizer.encode(out.prompt)])
cache = jax_mla.LatentCache.empty(config, batch=1, max_tokens=tokens.shape[1] + 64)
logits, cache = jax_mla.prefill(params, config, tokens, cache)
token = logits.argmax(axis=-1)
by_hand = [int(token[0])]
while len(by_hand) < len(out.tokens):
    token, cache = next_token(params, token, cache)
    by_hand.append(int(token[0]))
print(
    f"{len(by_hand)} tokens; prefill and decode_step wrote the same ones: {by_hand == out.tokens}"
)
