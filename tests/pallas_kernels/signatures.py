# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What a type checker must accept and refuse; `make lint` checks this file, nothing runs it.

A line that ends in an ignore comment has to be an error: where it is none, the comment is.
"""

from jax import Array

from pallas_kernels import flash_attention, mla_decode


def results(q: Array, k: Array, v: Array) -> None:
    out: Array = flash_attention(q, k, v, causal=False, scale=0.1, lengths=None)
    out, lse = flash_attention(q, k, v, return_lse=True, deterministic=True)
    decoded: Array = mla_decode(q, k, v, q, latent_dim=512, scale=0.1).lse
    del out, lse, decoded


def misspelt(q: Array, k: Array, v: Array) -> None:
    flash_attention(q, k, v, cusal=True)  # pyright: ignore[reportCallIssue]
    flash_attention(q, k, v, return_lse=True, legnths=None)  # pyright: ignore[reportCallIssue]
    flash_attention(q, k, v, implementation="cuda")  # pyright: ignore[reportArgumentType]
    mla_decode(q, k, v, q, latent_dim=512, scale=0.1, casual=False)  # pyright: ignore[reportCallIssue]
