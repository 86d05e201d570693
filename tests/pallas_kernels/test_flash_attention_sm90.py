"""The Hopper kernels of flash attention: simulated, lowered, compiled, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from kernel_tools import flash_attention_matrix as matrix
from kernel_tools.aot import compile_sm90a, lower_for_cuda
from kernel_tools.cases import AttentionCase as Case
from kernel_tools.interpreter import run_simulated
from numerics import normal

from pallas_kernels import dispatch, flash_attention, hardware
from pallas_kernels.accuracy import errors
from pallas_kernels.flash_attention.api import IMPLEMENTATIONS
from pallas_kernels.flash_attention.sm90.config import (
    BACKWARD,
    FORWARD,
    FUSED,
    HEAD_SIZES,
    Problem,
)
from pallas_kernels.flash_attention.sm90.launch import flash_attention_sm90, make_masks

NUM_SMS = hardware.H200_NUM_SMS
KERNELS = ("flash_attention_forward", "flash_attention_dq", "flash_attention_dk_dv")
# JAX 0.10 does not tell the compiler the name of a kernel with a sum.
FUSED_KERNEL = "flash_attention_backward" if jax.__version_info__ >= (0, 11) else "new_body"
HEADS = [f"{K}/{H}" for K, H in HEAD_SIZES]
MODES = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "fused"])

# Ids in no order, one of which returns.
UNSORTED = ((7, 30), (-2, 40), (1000, 20), (7, 40))
ONE_HEAD = functools.partial(Case, B=1, N=1, G=1, K=64, H=64)
# Small enough for the simulator; gradients in two kernels, and in one.
CASES = [
    *(
        ONE_HEAD(133, deterministic=deterministic, num_sms=num_sms)
        for deterministic, num_sms in ((True, NUM_SMS), (False, 1))
    ),
    Case(261, T=70, B=3, G=1, K=64, H=64, lengths=(70, 0, 261), deterministic=True, num_sms=2),
    Case(264, T=72, B=1, K=192, num_documents=3, deterministic=True, num_sms=NUM_SMS),
    ONE_HEAD(192, T=64, K=256, H=256, num_documents=2, lengths=(180,), num_sms=NUM_SMS),
    Case(200, T=70, G=1, K=192, num_documents=2, lengths=(190, 0), num_sms=2),
    *(
        ONE_HEAD(
            130, T=200, K=128, H=128, causal=False, dtype="float16", deterministic=deterministic,
            num_sms=num_sms,
        )
        for deterministic, num_sms in ((True, NUM_SMS), (False, 2))
    ),
    # Four query heads share a key head, and are split among CTAs.
    ONE_HEAD(130, N=4, documents=UNSORTED, deterministic=True, num_sms=4),
    ONE_HEAD(130, N=4, documents=UNSORTED, lengths=(129,), num_sms=4),
    *(
        ONE_HEAD(
            136, T=T, scale=7.0, dtype="float16", deterministic=deterministic, num_sms=NUM_SMS
        )
        for deterministic, T in ((True, 72), (False, 128))
    ),
]  # fmt: skip


def kernels(case):
    """The Hopper kernels without the dispatcher, which refuses them where no GPU is."""
    scale = case.K**-0.5 if case.scale is None else case.scale
    return lambda *qkv, **options: flash_attention_sm90(
        *qkv, **options | {"scale": scale}, num_sms=case.num_sms
    )


@pytest.mark.kernel_sim
@pytest.mark.parametrize("case", CASES, ids=str)
def test_simulated_equals_reference(case):
    matrix.check_attention(kernels(case), case, run=run_simulated)


@MODES
@pytest.mark.kernel_sim
def test_simulated_under_vmap(deterministic):
    """Two requests of different lengths; the sum of dq starts from zeros in each."""
    case = Case(
        128, N=1, G=1, K=64, H=64, lengths=(128, 70), deterministic=deterministic, num_sms=1
    )

    def run(_, *arrays):
        """Differentiates each request as a batch of its own."""
        options = case.options()
        lengths = options.pop("lengths")

        def one(lengths, *arrays):
            forward = functools.partial(kernels(case), lengths=lengths)
            return matrix.attend(forward, options, *arrays, lambda f, *args: f(*args))

        expanded = jax.tree.map(lambda x: x[:, None], (lengths, *arrays))
        return jax.tree.map(lambda x: x[:, 0], run_simulated(jax.vmap(one), *expanded))

    matrix.check_attention(kernels(case), case, run=run)


def shapes(K, H, *, B=1, T=4096, S=4096, N=16, G=16, dtype="bfloat16"):
    sizes = (B, T, N, K), (B, S, G, K), (B, S, G, H), (B, T, N, H)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def with_gradients(deterministic=True, num_sms=NUM_SMS):
    """out, lse, dq, dk, dv as a function of q, k, v, dout, segment_ids and lengths, or None."""
    options = {"causal": True, "scale": 0.1, "deterministic": deterministic, "num_sms": num_sms}

    def run(q, k, v, dout, segment_ids=None, lengths=None):
        masks = {"segment_ids": segment_ids, "lengths": lengths}
        attend = functools.partial(flash_attention_sm90, **options, **masks)
        (out, lse), pull_back = jax.vjp(attend, q, k, v)
        return out, lse, *pull_back((dout, jnp.sin(lse)))

    return run


def masks(B, S):
    return jax.ShapeDtypeStruct((B, S), jnp.int32), jax.ShapeDtypeStruct((B,), jnp.int32)


@MODES
@pytest.mark.parametrize("K, H", HEAD_SIZES, ids=HEADS)
def test_lowers_for_cuda(K, H, deterministic):
    """Layouts, TMA limits and shared memory, on every supported JAX."""
    arrays = *shapes(K, H, B=2, T=133, S=261, G=4), *masks(2, 261)
    text = lower_for_cuda(with_gradients(deterministic), *arrays)
    is_fused = not deterministic and (K, H) in FUSED
    assert "flash_attention_forward" in text
    assert ("flash_attention_dq" in text) != is_fused
    assert (FUSED_KERNEL in text) == is_fused


@MODES
def test_lowers_under_vmap_and_shard_map(deterministic):
    grad = with_gradients(deterministic)
    arrays = shapes(64, 64, B=8, T=256, S=256, N=2, G=2)
    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays]
    texts = [lower_for_cuda(jax.vmap(grad), *batched)]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P("data"),) * 4, "out_specs": (P("data"),) * 5}
    texts.append(lower_for_cuda(jax.shard_map(grad, mesh=mesh, **specs), *arrays))
    for kernel in KERNELS if deterministic else (KERNELS[0], FUSED_KERNEL):
        assert all(kernel in text for text in texts)


def test_named_implementation_is_used(monkeypatch):
    monkeypatch.setattr(hardware, "missing_gpu", lambda *_: None)

    def run(q, k, v, dout):
        attend = functools.partial(flash_attention, implementation="mosaic_gpu")
        return jax.vjp(attend, q, k, v)[1](dout)

    text = lower_for_cuda(run, *shapes(64, 64, T=128, S=128, N=1, G=1))
    assert all(kernel in text for kernel in (KERNELS[0], FUSED_KERNEL))


@pytest.mark.parametrize(
    "arrays, scale, reason",
    [
        (shapes(48, 32), 1.0, r"head sizes .* got \(48, 32\)"),
        (shapes(128, 64), 1.0, r"head sizes .* got \(128, 64\)"),
        (shapes(64, 64, dtype="float32"), 1.0, r"the dtype must be one of .*, got float32"),
        (shapes(64, 64), -1.0, "scale must be at least 1e-30, got -1.0"),
        (shapes(64, 64), 1e-39, "at least 1e-30, got 1e-39"),
        (shapes(64, 64), float("nan"), "at least 1e-30, got nan"),
        (shapes(64, 64), 1.0, "NVIDIA GPU of compute capability 9.0"),
    ],
    ids=["head-sizes", "narrow-v", "float32", "scale", "tiny-scale", "nan-scale", "no-gpu"],
)
def test_refuses_with_the_reason(arrays, scale, reason, monkeypatch):
    monkeypatch.setattr(hardware, "compute_capability", lambda device=None: None)
    with pytest.raises(NotImplementedError, match=reason):
        dispatch.select("op", IMPLEMENTATIONS, "mosaic_gpu", *arrays[:3], scale=scale)
    assert dispatch.select("op", IMPLEMENTATIONS, None, *arrays[:3], scale=scale).name == "xla"


def tensor_clocks(loop):
    """Clocks of the tensor cores in a loop: m64nNk16 takes N / 2 of them."""
    widths = (int(op.split(".64x")[1].split("x")[0]) * n for op, n in loop.items() if "HGMMA" in op)
    return sum(widths) // 2


@pytest.mark.kernel_aot
@pytest.mark.parametrize("is_masked", [False, True], ids=["causal", "causal-segments-lengths"])
@pytest.mark.parametrize("K, H", HEAD_SIZES, ids=HEADS)
def test_compiles_for_hopper(K, H, is_masked):
    """No spills, no serialised wgmma, and no product computed that need not be."""
    program = compile_sm90a(
        with_gradients(), *shapes(K, H, G=4), *(masks(1, 4096) if is_masked else ())
    )
    clocks = {}
    for kernel in program.kernels:
        kernel.check()
        assert not kernel.injected
        clocks.setdefault(kernel.name, []).append(tensor_clocks(kernel.loop("HGMMA")))
    columns = {  # of one step of one warpgroup, times what a column costs
        "flash_attention_forward": [FORWARD[K, H].block * (K + H)],
        "flash_attention_dq": [BACKWARD[K, H].block * (2 * K + H)],
        "flash_attention_dk_dv": [BACKWARD[K, H].block * (2 * K + 2 * H)],
    }
    if (K, H) == (256, 256):  # dk and dv do not fit in registers together
        columns["flash_attention_dk_dv"] = [64 * (K + H), 64 * (2 * K + H)]
    assert {name: sorted(found) for name, found in clocks.items()} == {
        name: [n // 32 for n in found] for name, found in columns.items()
    }


def fused_gradients(causal=True):
    """A function of q, k, v, dout, stats, segment_ids and lengths, without the forward pass."""
    from pallas_kernels.flash_attention.sm90.fused import gradients

    def run(q, k, v, dout, stats, segment_ids=None, lengths=None):
        (B, T, N, K), (S, G, H) = q.shape, v.shape[1:]
        problem = Problem(B, T, S, N, G, K, H, causal, 0.1, S - T, lengths is not None)
        masks = make_masks(B, T, S, segment_ids, lengths)
        return gradients(problem, masks, q, k, v, dout, stats, num_sms=NUM_SMS)

    return run


@pytest.mark.kernel_aot
@pytest.mark.parametrize("is_masked", [False, True], ids=["causal", "full-segments-lengths"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("K, H", FUSED, ids=[f"{K}/{H}" for K, H in FUSED])
def test_fused_gradients_compile_for_hopper(K, H, dtype, is_masked):
    """No spills, no serialised wgmma, and five matmuls."""
    G = 4 if is_masked and dtype == "bfloat16" else 16
    arrays = *shapes(K, H, G=G, dtype=dtype), jax.ShapeDtypeStruct((1, 16, 2, 4096), jnp.float32)
    arrays += masks(1, 4096) if is_masked else ()
    (kernel,) = compile_sm90a(fused_gradients(not is_masked), *arrays).kernels
    kernel.check()
    assert not kernel.injected
    loop = kernel.loop("HGMMA")
    assert tensor_clocks(loop) == FUSED[K, H].block * (3 * K + 2 * H) // 32
    assert loop.of("UTMAREDG") == 1


@MODES
@pytest.mark.kernel_aot
def test_split_groups_compile_for_hopper(deterministic):
    """16 query heads share 16 tiles of keys: 8 splits of 2 heads make 128 tiles of them."""
    arrays = *shapes(192, 128, T=2048, S=2048, G=1), *masks(1, 2048)
    kernels = compile_sm90a(with_gradients(deterministic, NUM_SMS), *arrays).kernels
    grids = {kernel.name: kernel.grid[0] for kernel in kernels}
    assert grids[KERNELS[2] if deterministic else FUSED_KERNEL] == 128
    for kernel in kernels:
        kernel.check()


@pytest.mark.kernel_aot
def test_lengths_cost_no_copy_of_the_keys():
    """Few queries over a long cache; the keys are 201 MB."""
    q, k, v, _ = shapes(192, 128, T=128, S=32768)

    def run(q, k, v, lengths):
        options = {"causal": True, "scale": 0.1, "segment_ids": None, "deterministic": False}
        options |= {"lengths": lengths, "num_sms": NUM_SMS}
        return flash_attention_sm90(q, k, v, **options)[0]

    assert compile_sm90a(run, q, k, v, masks(1, 32768)[1]).temp_bytes < 4e6


@pytest.mark.kernel_aot
def test_float16_compiles_for_hopper():
    kernels = compile_sm90a(with_gradients(), *shapes(192, 128, dtype="float16")).kernels
    assert {kernel.name for kernel in kernels} == set(KERNELS)
    for kernel in kernels:
        kernel.check()


@MODES
@pytest.mark.kernel_aot
def test_memory_grows_with_the_length(deterministic):
    """At 32k tokens the scores of one head would be 2 GB in bfloat16."""

    def run(q, k, v, dout):
        return with_gradients(deterministic)(q, k, v, dout)[2:]

    half, whole = (
        compile_sm90a(run, *shapes(192, 128, T=T, S=T)).temp_bytes for T in (16384, 32768)
    )
    assert whole < 2.2 * half
    size = 3 * (2 * 128 + 8)  # out, its gradient, lse and what is made of it
    size += 0 if deterministic else 4 * 192  # the sum of dq
    assert whole < 16 * 32768 * size


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_cases_on_a_gpu(case):
    matrix.check_attention(kernels(case), case)


@pytest.mark.gpu
@MODES
@pytest.mark.parametrize("S", [1024, 4096, 16384])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("G", [8, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("K, H", HEAD_SIZES, ids=HEADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_equal_xla_on_a_gpu(dtype, K, H, G, causal, S, deterministic):
    if not deterministic and (K, H) not in FUSED:
        pytest.skip("is deterministic in any case")
    sizes = dict(B=1, N=8, G=G, K=K, H=H)
    case = Case(S, **sizes, causal=causal, deterministic=deterministic, dtype=dtype)
    matrix.check_attention("mosaic_gpu", case)


@MODES
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("K, H", [(128, 128), (192, 128)], ids=["128/128", "192/128"])
def test_gradients_equal_cudnn(rng, K, H, causal, deterministic):
    """Through what jax.nn calls, because jax.nn refuses values narrower than keys."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    sizes = (4096, 8, K), (4096, 8, K), (4096, 8, H), (4096, 8, H)
    q, k, v, dout = (normal(rng, (2, *size), "bfloat16") for size in sizes)
    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    cudnn = functools.partial(fused.dot_product_attention, scale=K**-0.5, mask_type=mask)
    options = {"causal": causal, "deterministic": deterministic}
    ours = functools.partial(flash_attention, **options, implementation="mosaic_gpu")
    for got, want in zip(
        jax.vjp(ours, q, k, v)[1](dout), jax.vjp(cudnn, q, k, v)[1](dout), strict=True
    ):
        assert errors(got, want)[0] <= 1e-2
