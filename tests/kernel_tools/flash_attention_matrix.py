"""Flash attention against float32 on the same rounded inputs: out, lse and all three gradients.

    check_attention("mosaic_gpu", Case(S=300, N=4, G=2, K=192, H=128))     # AssertionError if not

An error may be twice that of "xla" in the same dtype, three times for a gradient: both round to it.
Rows are looked at one by one too, with twice that: a wrong one would be lost among thousands.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention
from pallas_kernels.accuracy import errors

FACTOR = {"out": 2, "lse": 2, "dq": 3, "dk": 3, "dv": 3}
LSE_ROUNDING = 1e-5  # RMS relative to RMS: exponentials of a GPU are approximate


@dataclasses.dataclass(frozen=True)
class Case:
    """T queries at the end of S keys; lengths and documents at random where there are any."""

    S: int
    T: int | None = None
    B: int = 2
    N: int = 2
    G: int = 2
    K: int = 128
    H: int = 128
    causal: bool = True
    is_ragged: bool = False
    num_documents: int = 1
    deterministic: bool = False
    scale: float | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        flags = ["causal" if self.causal else "full"]
        flags += ["ragged"] * self.is_ragged + ["deterministic"] * self.deterministic
        flags += [f"packed{self.num_documents}"] if self.num_documents > 1 else []
        flags += [f"scale{self.scale}"] if self.scale is not None else []
        sizes = f"B{self.B}-T{self.T or self.S}-S{self.S}-N{self.N}-G{self.G}-K{self.K}-H{self.H}"
        return "-".join([sizes, *flags, self.dtype])

    def options(self, rng: np.random.Generator) -> dict:
        options = dict(causal=self.causal, deterministic=self.deterministic, scale=self.scale)
        if self.is_ragged:
            options["lengths"] = np.array([0, *rng.integers(1, self.S + 1, self.B - 1)])
        if self.num_documents > 1:
            borders = rng.choice(np.arange(1, self.S), self.num_documents - 1, replace=False)
            ids = np.searchsorted(np.sort(borders), np.arange(self.S), side="right")
            options["segment_ids"] = np.tile(ids.astype(np.int32), (self.B, 1))
        return options


def check_attention(implementation: str, case: Case, seed: int = 0) -> None:
    """Compares `implementation` with float32; AssertionError names the case and what is off."""
    options = case.options(np.random.default_rng(seed))
    inputs, cotangents = make_arrays(case, options, seed)
    want = attend("xla", options, *_cast(inputs, cotangents, "float32"))
    usual = attend("xla", options, inputs, cotangents)
    assert_accurate(attend(implementation, options, inputs, cotangents), usual, want, case)


def assert_accurate(got: dict, usual: dict, want: dict, case: object) -> None:
    """Compares results with those in float32, and their errors with the usual ones."""
    for name in want:
        assert got[name].dtype == usual[name].dtype, name
        found, yardsticks = errors(got[name], want[name]), errors(usual[name], want[name])
        least = LSE_ROUNDING if name == "lse" else 0
        for place, factor, error, yardstick in zip(
            ("", " in its worst row"), (1, 2), found, yardsticks, strict=True
        ):
            allowed = factor * max(FACTOR[name] * yardstick, least)
            assert error <= allowed, (
                f"{case}: {name} has a relative RMS error{place} of {error:.2e},"
                f" {allowed:.2e} is allowed"
            )


def attend(implementation: str, options: dict, inputs, cotangents) -> dict[str, jax.Array]:
    """out, lse and the gradients for these cotangents."""

    @jax.jit
    def run(inputs, cotangents):
        def forward(q, k, v):
            return flash_attention(
                q, k, v, return_lse=True, implementation=implementation, **options
            )

        outputs, pullback = jax.vjp(forward, *inputs)
        return dict(
            zip(("out", "lse", "dq", "dk", "dv"), (*outputs, *pullback(cotangents)), strict=True)
        )

    return run(inputs, cotangents)


def make_arrays(case: Case, options: dict, seed: int) -> tuple:
    """q, k, v with NaN where no length reaches, and cotangents of out and lse."""
    T, S, dtype = case.T or case.S, case.S, case.dtype
    shapes = ((T, case.N, case.K), (S, case.G, case.K), (S, case.G, case.H), (T, case.N, case.H))
    *keys, last = jax.random.split(jax.random.key(seed), 5)
    q, k, v, dout = (
        jax.random.normal(key, (case.B, *shape), dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    if (lengths := options.get("lengths")) is not None:
        is_read = np.arange(S) < lengths[:, None]
        k, v = (jnp.where(is_read[:, :, None, None], x, jnp.nan) for x in (k, v))
    return (q, k, v), (dout, jax.random.normal(last, (case.B, T, case.N)))


def _cast(inputs, cotangents, dtype):
    dout, dlse = cotangents
    return tuple(x.astype(dtype) for x in inputs), (dout.astype(dtype), dlse)
