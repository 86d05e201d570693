"""A step as two arrays of numbers, one row per request: one transfer to the device each.

An int32 row is the columns below, then the new tokens, then the page table. Rows beyond the
requests are padding: they have no tokens, and their page tables and slots name nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int32

from jax_mla.serving.request import MAX_BIASED_TOKENS, Request
from jax_mla.serving.scheduler import Row

# start: tokens in cache. count: new tokens. position: of the next token, in the continuation.
INTEGERS: tuple[str, ...] = ("slot", "start", "count", "is_last", "seed", "position", "top_k")
NUMBERS: tuple[str, ...] = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
# In place of a token: the last one that the slot has chosen.
LAST_CHOSEN = -1


def pack(
    rows: Sequence[Row], *, batch: int, num_tokens: int, table_width: int, num_slots: int
) -> Int32[np.ndarray, "batch columns"]:
    """The rows of a step as int32, `num_tokens` and `table_width` of each at most."""
    work = np.zeros((batch, len(INTEGERS) + num_tokens + table_width), np.int32)
    work[:, 0] = num_slots
    tokens, tables = work[:, len(INTEGERS) : -table_width], work[:, -table_width:]
    tables[:] = -1
    for i, row in enumerate(rows):
        request, end = row.request, row.start + row.count
        options, sampling = request.options, request.sampling
        seed = np.uint32(options.seed).view(np.int32)
        position = end - len(request.prompt)
        top_k = min(sampling.top_k or np.iinfo(np.int32).max, np.iinfo(np.int32).max)
        columns = [request.slot, row.start, row.count, row.is_last, seed, position, top_k]
        work[i, : len(INTEGERS)] = np.asarray(columns, np.int32)
        known = request.ids[row.start : end]
        tokens[i, : len(known)] = known
        tokens[i, len(known) : row.count] = LAST_CHOSEN
        tables[i, : len(request.table)] = request.table
    return work


def pack_options(requests: Sequence[Request], batch: int) -> Float32[np.ndarray, "batch columns"]:
    """How the requests of a step choose their tokens; padding takes the most likely ones."""
    numbers = np.zeros((batch, len(NUMBERS)), np.float32)
    for i, request in enumerate(requests):
        options, sampling = request.options, request.sampling
        numbers[i] = (
            sampling.temperature,
            1.0 if sampling.top_p is None else sampling.top_p,
            0.0 if sampling.min_p is None else sampling.min_p,
            options.repetition_penalty,
            options.presence_penalty,
            options.frequency_penalty,
        )
    numbers[len(requests) :, NUMBERS.index("repetition_penalty")] = 1
    return numbers


def pack_biases(
    rows: Sequence[Row], batch: int, vocab_size: int
) -> tuple[Int32[np.ndarray, "batch biased"], Float32[np.ndarray, "batch biased"]]:
    """Token ids and what is added to their logits; unused entries name no token."""
    ids = np.full((batch, MAX_BIASED_TOKENS), vocab_size, np.int32)
    values = np.zeros((batch, MAX_BIASED_TOKENS), np.float32)
    for i, row in enumerate(rows):
        request = row.request
        biases = dict(request.options.logit_bias)
        if row.start + row.count - len(request.prompt) < request.options.min_tokens:
            biases |= dict.fromkeys(request.stop_ids, -np.inf)
        ids[i, : len(biases)] = list(biases)
        values[i, : len(biases)] = list(biases.values())
    return ids, values
