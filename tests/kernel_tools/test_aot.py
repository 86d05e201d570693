"""The reader of compiled kernels itself: right on small kernels, and it sees planted faults."""

import jax
import jax.numpy as jnp
import pytest
from kernel_tools import aot
from kernel_tools.aot import compile_sm90a, lower_for_cuda

ROWS, K = 64, 64


@pytest.fixture
def plgpu():
    return pytest.importorskip("jax.experimental.pallas.mosaic_gpu")


@pytest.fixture
def pl():
    return pytest.importorskip("jax.experimental.pallas")


def shapes(columns):
    return (
        jax.ShapeDtypeStruct((ROWS, K), jnp.bfloat16),
        jax.ShapeDtypeStruct((K, columns), jnp.bfloat16),
    )


def matmul(plgpu, multiply, *, columns, steps=1):
    """A kernel whose `multiply(a_smem, b_smem)` gives the block that is added up `steps` times."""

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, loaded):
        plgpu.copy_gmem_to_smem(a_gmem, a_smem, loaded.at[0])
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, loaded.at[0])
        plgpu.barrier_wait(loaded.at[0])
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)
        total = jax.lax.fori_loop(0, steps, lambda _, x: x + multiply(a_smem, b_smem), zeros)
        out_smem[...] = total.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    def smem(*shape):
        transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((ROWS, columns), jnp.bfloat16),
        grid=(3,),
        grid_names=("block",),
        scratch_types=[
            smem(ROWS, K),
            smem(K, columns),
            smem(ROWS, columns),
            plgpu.Barrier(num_barriers=1, num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def product(plgpu, pl, columns):
    def multiply(a_smem, b_smem):
        def body(acc):
            plgpu.wgmma(acc, a_smem, b_smem)
            return acc[...]

        return pl.run_scoped(body, plgpu.ACC((ROWS, columns), jnp.float32))

    return multiply


@pytest.mark.kernel_aot
def test_figures_of_a_clean_kernel(plgpu, pl):
    program = compile_sm90a(matmul(plgpu, product(plgpu, pl, 128), columns=128), *shapes(128))
    (kernel,) = program.kernels
    kernel.check()
    assert kernel.serialized == kernel.injected == ()
    assert (kernel.grid[0], kernel.cluster, kernel.threads) == (3, (1, 1, 1), 128)
    # Three buffers and one barrier, each rounded up to 1024 bytes or not at all.
    assert 0 <= kernel.shared_memory_bytes - 2 * (ROWS * K + K * 128 + ROWS * 128) <= 1024
    assert kernel.instructions.of("HGMMA.64x128x16.F32.BF16") == K // 16
    assert kernel.instructions.of("UTMALDG") == 2 and kernel.instructions.of("UTMASTG") == 1
    assert 64 <= kernel.registers <= 255
    assert program.output_bytes == 2 * ROWS * 128 and program.temp_bytes == 0
    assert "HGMMA.64x128x16.F32.BF16 4" in str(program)


@pytest.mark.kernel_aot
def test_loop_is_told_from_what_surrounds_it(plgpu, pl):
    kernel = matmul(plgpu, product(plgpu, pl, 64), columns=64, steps=100)
    (kernel,) = compile_sm90a(kernel, *shapes(64)).kernels
    loop = kernel.loop("HGMMA")  # which ptxas unrolls
    assert loop.of("FADD") > 0
    assert loop.of("HGMMA") / loop.of("FADD") == (K // 16) / (ROWS * 64 // 128)
    assert loop.of("UTMA") == 0 and kernel.instructions.of("UTMA") > 0


@pytest.mark.kernel_aot
def test_same_kernel_again_gives_the_same_figures(plgpu, pl):
    kernel = matmul(plgpu, product(plgpu, pl, 64), columns=64)
    first, second = (compile_sm90a(kernel, *shapes(64)).kernels[0] for _ in range(2))
    assert first.instructions == second.instructions


@pytest.mark.kernel_aot
def test_two_kernels_and_a_buffer_between_them(plgpu, pl):
    small, large = (
        matmul(plgpu, product(plgpu, pl, columns), columns=columns) for columns in (64, 128)
    )

    def both(a, b, c):
        return large(small(a, b), c)

    program = compile_sm90a(both, *shapes(64), shapes(128)[1])
    found = [k.instructions.of("HGMMA.64x64") > 0 for k in program.kernels]
    assert sorted(found) == [False, True]
    assert all(
        k.shared_memory_bytes > 2 * (K * 128 + ROWS * 128)
        for k in program.kernels
        if k.instructions.of("HGMMA.64x128")
    )
    assert program.temp_bytes >= 2 * ROWS * 64


@pytest.mark.kernel_aot
def test_planted_spill_is_reported(plgpu, pl):
    def multiply(a_smem, b_smem):
        def body(left, right):  # 64 x 512 sums of one warpgroup are 256 registers per thread
            plgpu.wgmma(left, a_smem, b_smem)
            plgpu.wgmma(right, a_smem, b_smem)
            return left[...] * right[...]

        acc = plgpu.ACC((ROWS, 256), jnp.float32)
        return pl.run_scoped(body, acc, acc)

    kernel = matmul(plgpu, multiply, columns=256, steps=100)
    (kernel,) = compile_sm90a(kernel, *shapes(256)).kernels
    assert kernel.spill_store_bytes > 0 and kernel.spill_load_bytes > 0
    with pytest.raises(AssertionError, match=f"kernel: spills {kernel.spill_store_bytes} bytes"):
        kernel.check()


@pytest.mark.kernel_aot
def test_planted_serialisation_is_reported(plgpu, pl):
    def multiply(a_smem, b_smem):
        def body(*accs):  # 64 x 576 sums do not fit in registers at once
            for acc in accs:
                plgpu.wgmma(acc, a_smem, b_smem)
            return sum(acc[...] for acc in accs)

        return pl.run_scoped(body, *[plgpu.ACC((ROWS, 64), jnp.float32)] * 9)

    (kernel,) = compile_sm90a(matmul(plgpu, multiply, columns=64), *shapes(64)).kernels
    assert len(kernel.injected) > 0
    with pytest.raises(AssertionError, match=r"kernel: .*wgmma serialised: .*C751\d"):
        kernel.check()


@pytest.mark.kernel_aot
def test_function_without_a_kernel_is_an_error():
    with pytest.raises(RuntimeError, match="no Mosaic GPU kernel"):
        compile_sm90a(lambda a, b: a @ b, *shapes(64))


@pytest.mark.kernel_aot
@pytest.mark.parametrize("missing", ["ptxas", "nvdisasm"])
def test_missing_tool_is_named(monkeypatch, missing):
    monkeypatch.setattr(aot, "_find", lambda tool: None if tool == missing else "/bin/true")
    assert aot.why_not().startswith(f"no {missing} on PATH")


def test_lowering_needs_no_compiler_and_names_the_kernel(plgpu, pl):
    text = lower_for_cuda(matmul(plgpu, product(plgpu, pl, 64), columns=64), *shapes(64))
    assert "mosaic_gpu" in text


def test_lowering_refuses_too_much_shared_memory(plgpu, pl):
    kernel = plgpu.kernel(
        lambda out_gmem, big_smem: None,
        out_type=jax.ShapeDtypeStruct((ROWS, K), jnp.bfloat16),
        scratch_types=[plgpu.SMEM((2**17,), jnp.bfloat16)],
    )
    with pytest.raises(Exception, match="shared memory"):
        lower_for_cuda(kernel)
