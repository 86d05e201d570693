"""Text from the bundled model: generation in one call, and the loop that it stands for."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jax_mla

params, config = jax_mla.load(Path(jax_mla.__file__).parent / "demo" / "model")
prompt = b"And it came to pass"  # the bundled model reads bytes: a byte is its own token id
tokens = jnp.array([[config.bos_token_id, *prompt]])

out = jax_mla.generate(params, config, tokens, max_new_tokens=64)
text = bytes(token for token in np.asarray(out.tokens)[0, : int(out.lengths[0])] if token < 256)
print((prompt + text).decode(errors="replace"))


@jax.jit
def next_token(params, token, cache):
    logits, cache = jax_mla.decode_step(params, config, token, cache)
    return logits.argmax(axis=-1), cache


# The same by hand: the cache goes in and comes out, nothing is changed in place.
cache = jax_mla.LatentCache.empty(config, batch=1, max_tokens=tokens.shape[1] + 64)
logits, cache = jax_mla.prefill(params, config, tokens, cache)
token = logits.argmax(axis=-1)
by_hand = [int(token[0])]
while len(by_hand) < int(out.lengths[0]):
    token, cache = next_token(params, token, cache)
    by_hand.append(int(token[0]))
same = by_hand == np.asarray(out.tokens)[0, : len(by_hand)].tolist()
print(f"{len(by_hand)} tokens; prefill and decode_step wrote the same ones: {same}")
