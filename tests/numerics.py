"""What tests of arrays share: a comparison within the bounds, poison, random inputs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.accuracy import BOUNDS, WORST

POISONS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 1e30}


def assert_close(got, want, dtype=None):
    """Raises unless `got` equals `want` within the bound of `dtype` (default: got's dtype).

    NaN and infinities must be in the same places; then the RMS of the difference and its largest
    entry are bounded.
    """
    bound = BOUNDS[str(jnp.dtype(dtype or got.dtype))]
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape} instead of {want.shape}"
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = np.argwhere(test(got) != test(want))
        assert len(wrong) == 0, (
            f"{name} in {test(got).sum()} places instead of {test(want).sum()},"
            f" first difference at {tuple(wrong[0])}"
        )
    is_finite = np.isfinite(want)
    if not is_finite.any():
        return
    want = np.where(is_finite, want, 0)
    error = np.abs(np.where(is_finite, got, 0) - want)
    rms = np.sqrt(np.mean(want[is_finite] ** 2))
    relative_rms = np.sqrt(np.mean(error[is_finite] ** 2)) / max(rms, np.finfo(np.float32).tiny)
    relative = error / np.maximum(rms + np.abs(want), np.finfo(np.float32).tiny)
    at = np.unravel_index(np.argmax(relative), relative.shape)
    message = (
        f"RMS error {relative_rms:.2e} of RMS {rms:.2e} (bound {bound:.0e}); largest error"
        f" {error[at]:.2e} at {tuple(map(int, at))}, where {got[at]:.6g} should be {want[at]:.6g}"
        f" (bound {WORST * bound:.0e} relative)"
    )
    assert relative_rms <= bound and relative[at] <= WORST * bound, message


def assert_same_bits(got, want):
    """Raises unless two trees of arrays have one structure, and equal dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    leaves = jax.tree_util.tree_leaves_with_path(got)
    for (path, x), y in zip(leaves, jax.tree.leaves(want), strict=True):
        x, y, name = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.tobytes() == y.tobytes(), f"{name} differs"


def poison(x, is_unread, value=np.nan):
    """A copy of `x` with `value` where `is_unread`; that names the leading axes of `x`."""
    is_unread = np.asarray(is_unread)
    is_unread = is_unread.reshape(is_unread.shape + (1,) * (np.ndim(x) - is_unread.ndim))
    poisoned = np.where(is_unread, np.asarray(value, np.float32), np.asarray(x, np.float32))
    return jnp.asarray(poisoned, x.dtype)


def normal(rng, shape, dtype="float32", scale=1.0):
    """A JAX array of normal numbers, rounded to `dtype`."""
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


def slow_attention(q, k, v, is_visible, scale):
    """Attention of one head in float64, one query at a time: out "T H" and lse "T".

    Keys that a query does not see are left out, not masked, so their values cannot matter.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for t, seen in enumerate(is_visible):
        if seen.any():
            scores = scale * (k[seen] @ q[t])
            weights = np.exp(scores - scores.max())
            out[t] = weights @ v[seen] / weights.sum()
            lse[t] = scores.max() + np.log(weights.sum())
    return out, lse


def unchecked(function):
    """`function` without the shape checks that `--jaxtyping-packages` wraps around it.

    For tests of our own messages, which those checks would come before.
    """
    return inspect.unwrap(function)
