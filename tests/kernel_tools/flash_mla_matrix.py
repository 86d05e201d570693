"""FlashMLA's test of dense decode: its shapes, poison and bounds, against float32.

    for data in DATA:
        check_decode(decode, Case(B=6, T=2, N=63), data)     # raises AssertionError

`decode(arrays, case)` returns out and lse. FlashMLA also tests several key heads; `mla_decode` has
one by contract (MLA shares the latent among all heads), so h_kv > 1 is not here.
Source: FlashMLA, tests/test_flash_mla_dense_decoding.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from kernel_tools.cases import GARBAGE

OUT_ABSOLUTE, OUT_RELATIVE, OUT_COSINE = 8e-4, 2.01 / 128, 5e-6
LSE_ABSOLUTE, LSE_RELATIVE = 1e-6, 8.01 / 65536


@dataclasses.dataclass(frozen=True)
class Case:
    """What one program is compiled for; Data are its lengths, many per program."""

    B: int
    T: int
    N: int
    causal: bool = True
    dtype: str = "bfloat16"
    C: int = 512
    R: int = 64
    page_size: int = 64
    capacity: int = 8192  # tokens that a row of the page table has room for
    num_sms: int | None = None  # multiprocessors that the plan is for; None is the device's
    filled_rows: int = 512  # the reference pads T * N to it, so that few programs are compiled

    def __str__(self) -> str:
        causal = "causal" if self.causal else "full"
        sizes = f"{self.C}+{self.R}-page{self.page_size}"
        return f"B{self.B}-T{self.T}-N{self.N}-{causal}-{sizes}-{self.dtype}"


@dataclasses.dataclass(frozen=True)
class Data:
    """Lengths of a batch: all S, or drawn from normal(S, S / 2); about half of them 0 on demand."""

    S: int
    is_ragged: bool
    is_half_empty: bool = False

    def lengths(self, case: Case, rng: np.random.Generator) -> np.ndarray:
        lengths = np.full(case.B, self.S)
        if self.is_ragged:
            lengths = np.maximum(rng.normal(self.S, self.S / 2, case.B).astype(int), case.T)
        if self.is_half_empty:
            lengths[rng.random(case.B) < 0.5] = 0
        return np.minimum(lengths, case.capacity)


class Arrays(NamedTuple):
    """Arguments of a decode step."""

    q: jax.Array
    kv_pages: jax.Array
    page_table: jax.Array
    lengths: jax.Array


CASES = [
    Case(B, T, N, causal)
    for B in (1, 2, 6, 64)
    for T in (1, 2, 4)
    for N in (1, 3, 9, 63, 64, 126, 128)
    for causal in (True, False)
]
DATA = [Data(S, is_ragged) for S in (20, 140, 4096) for is_ragged in (False, True)]
CORNER_CASES = [Case(128, 2, N, causal) for N in (1, 63, 64, 128) for causal in (True, False)]
CORNER_DATA = Data(4096, is_ragged=True, is_half_empty=True)


def check_decode(decode: Callable[[Arrays, Case], tuple], case: Case, data: Data) -> None:
    """Runs one step and compares it; AssertionError names the case and the first difference."""
    arrays, border = make_arrays(case, data)
    out, lse = decode(arrays, case)
    want_out, want_lse = _reference(arrays, border, case)
    assert out.dtype == jnp.dtype(case.dtype) and lse.dtype == jnp.float32
    compare(f"{case}, {data}: out", out, want_out, OUT_ABSOLUTE, OUT_RELATIVE, OUT_COSINE)
    compare(f"{case}, {data}: lse", lse, want_lse, LSE_ABSOLUTE, LSE_RELATIVE)


def make_arrays(case: Case, data: Data, seed: int = 0) -> tuple[Arrays, np.ndarray]:
    """Shuffled pages with NaN wherever no request has a token, and each query's border."""
    rng = np.random.default_rng(seed)
    lengths, max_pages = data.lengths(case, rng), case.capacity // case.page_size
    table = rng.permutation(case.B * max_pages).reshape(case.B, max_pages)
    tokens = np.arange(case.capacity).reshape(max_pages, case.page_size)
    is_used = np.zeros((case.B * max_pages, case.page_size), bool)
    is_used[table] = tokens < lengths[:, None, None]
    table[tokens[:, 0] >= lengths[:, None]] = GARBAGE
    shape = (case.B, case.T, case.N, case.C + case.R)
    q, kv_pages = _numbers(seed, shape, is_used, jnp.dtype(case.dtype))
    hidden = np.arange(case.T - 1, -1, -1) if case.causal else np.zeros(case.T, int)
    arrays = Arrays(q, kv_pages, jnp.asarray(table, jnp.int32), jnp.asarray(lengths, jnp.int32))
    return arrays, lengths[:, None] - hidden


@functools.partial(jax.jit, static_argnums=(1, 3))
def _numbers(seed, q_shape, is_used, dtype):
    keys = jax.random.split(jax.random.key(seed))
    kv_shape = (*is_used.shape, q_shape[-1])
    q, kv_pages = (
        jnp.clip(jax.random.normal(key, shape, dtype) / 10, -1, 1)
        for key, shape in zip(keys, (q_shape, kv_shape), strict=True)
    )
    return q, jnp.where(is_used[..., None], kv_pages, jnp.nan)


def _reference(arrays: Arrays, border: np.ndarray, case: Case):
    rows, filled = case.T * case.N, case.filled_rows
    q = jnp.pad(arrays.q.reshape(case.B, rows, -1), ((0, 0), (0, filled - rows), (0, 0)))
    border = np.pad(np.repeat(border, case.N, axis=1), ((0, 0), (0, filled - rows)))
    table = jnp.where(arrays.page_table == GARBAGE, 0, arrays.page_table)
    out, lse = _attend(q, arrays.kv_pages, table, arrays.lengths, border, case.C)
    shape = (case.B, case.T, case.N)
    return out[:, :rows].reshape(*shape, case.C), lse[:, :rows].reshape(shape)


@functools.partial(jax.jit, static_argnums=5)
def _attend(q, kv_pages, table, lengths, border, C):
    """Softmax over all keys of a request at once, in float32, a request at a time."""
    scale = q.shape[-1] ** -0.5
    dot = functools.partial(jnp.matmul, precision="highest")

    def attend(request):
        q, table, length, border = request
        kv = kv_pages[table].reshape(-1, q.shape[-1]).astype(jnp.float32)
        tokens = jnp.arange(len(kv))
        kv = jnp.where(tokens[:, None] < length, kv, 0)
        scores = scale * dot(q.astype(jnp.float32), kv.T)
        scores = jnp.where(tokens[None, :] < border[:, None], scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=1)
        p = jnp.exp(scores - jnp.where(lse == -jnp.inf, 0, lse)[:, None])
        return dot(p, kv[:, :C]), lse

    return jax.lax.map(attend, (q, table, lengths, jnp.asarray(border)))


def compare(name, got, want, absolute: float, relative: float, cosine: float | None = None):
    """FlashMLA's bounds: NaN and infinities alike, entries within one of two, and the cosine."""
    is_outside, is_finite, error, cosine_error = _errors(got, want, absolute, relative)
    if bool(jnp.any(is_outside)):
        at = tuple(map(int, np.argwhere(np.asarray(is_outside))[0]))
        raise AssertionError(
            f"{name}: {int(is_outside.sum())} of {is_outside.size} entries are outside of"
            f" {absolute:.1e} absolute and {relative:.1e} relative, the first at {at}:"
            f" {float(got[at]):.7g} should be {float(want[at]):.7g}; the largest error is"
            f" {float(error):.2e} where both are finite ({int(is_finite.sum())} entries)"
        )
    assert cosine is None or float(cosine_error) <= cosine, (
        f"{name}: 1 - cosine {float(cosine_error):.2e} is above {cosine:.0e}"
    )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _errors(got, want, absolute, relative):
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    is_finite = jnp.isfinite(got) & jnp.isfinite(want)
    got_number, want_number = (jnp.where(is_finite, x, 0) for x in (got, want))
    error = jnp.abs(got_number - want_number)
    is_inside = (error <= absolute) | (error <= relative * jnp.abs(want_number))
    is_alike = is_finite | (got == want) | (jnp.isnan(got) & jnp.isnan(want))
    # 1 - 2 sum(a b) / sum(a^2 + b^2), written so that float32 does not cancel.
    energy = jnp.sum(got_number**2 + want_number**2)
    cosine_error = jnp.where(energy > 0, jnp.sum(error**2) / jnp.where(energy > 0, energy, 1), 0)
    return ~(is_inside & is_alike), is_finite, jnp.max(error), cosine_error
