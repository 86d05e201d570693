"""The simulator itself: it runs what JAX's does not, and it catches planted bugs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernel_tools.interpreter import RaceError, run_simulated, simulate

pytestmark = pytest.mark.kernel_sim

M = 64  # rows and columns of every matrix here


@pytest.fixture
def plgpu():
    return pytest.importorskip("jax.experimental.pallas.mosaic_gpu")


@pytest.fixture
def pl():
    return pytest.importorskip("jax.experimental.pallas")


@pytest.fixture
def a(rng):
    return jnp.asarray(rng.standard_normal((M, M)), jnp.bfloat16)


@pytest.fixture
def b(rng):
    return jnp.asarray(rng.standard_normal((M, M)), jnp.bfloat16)


def matmul(a, b):
    return np.asarray(a, np.float32) @ np.asarray(b, np.float32)


def tiles(plgpu, *shape):
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def one_warpgroup(plgpu, body, *, out=(M, M), scratch=()):
    """A kernel whose body sees a_gmem, b_gmem, out_gmem, b_smem (loaded) and `scratch`."""

    def kernel(a_gmem, b_gmem, out_gmem, b_smem, loaded, *scratch):
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, loaded.at[0])
        plgpu.barrier_wait(loaded.at[0])
        body(a_gmem, b_gmem, out_gmem, b_smem, loaded, *scratch)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out, jnp.float32),
        scratch_types=[tiles(plgpu, M, M), plgpu.Barrier(num_barriers=1), *scratch],
    )


def test_run_state_with_an_operand_in_registers(plgpu, pl, a, b):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded):
        start = plgpu.ACC.init(jnp.ones((M, M), jnp.float32))
        out_gmem[...] = pl.run_state(lambda acc: plgpu.wgmma(acc, a_gmem[...], b_smem))(start)

    got = run_simulated(one_warpgroup(plgpu, body), a, b)
    np.testing.assert_allclose(got, matmul(a, b) + 1, rtol=1e-5, atol=1e-5)


def test_accumulator_that_is_rescaled_in_place(plgpu, pl, a, b):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded):
        def twice(acc):
            acc[...] = jnp.zeros((M, M), jnp.float32)
            plgpu.wgmma(acc, a_gmem[...], b_smem)
            acc[...] = acc[...] * 3
            plgpu.wgmma(acc, a_gmem[...], b_smem)
            return acc[...]

        out_gmem[...] = pl.run_scoped(twice, plgpu.ACC((M, M), jnp.float32))

    got = run_simulated(one_warpgroup(plgpu, body), a, b)
    np.testing.assert_allclose(got, 4 * matmul(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [True, False])
def test_predicated_store(plgpu, a, b, stored):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded, out_smem):
        for value, predicate in ((1.0, True), (2.0, stored)):
            out_smem[...] = jnp.full((M, M), value, jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, out_gmem, predicate=jnp.bool_(predicate))
            plgpu.wait_smem_to_gmem(0)

    kernel = one_warpgroup(plgpu, body, scratch=[plgpu.SMEM((M, M), jnp.float32)])
    np.testing.assert_array_equal(run_simulated(kernel, a, b), 2.0 if stored else 1.0)


def addition(plgpu, pl, *, op="add", is_ordered=True, commits=True, waits=True):
    """Two warpgroups add ones and then twos to what one of them set to zero; bugs on demand."""

    def kernel(total_gmem, smem, zeroed):
        warpgroup = lax.axis_index("warpgroup")
        ones = smem.at[warpgroup]

        def store(value, **options):
            ones[...] = jnp.full((M, M), value, jnp.float32)
            if commits:
                plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ones, total_gmem, **options)

        @pl.when(warpgroup == 0)
        def _():
            store(0.0)
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(zeroed.at[0])

        if is_ordered:
            plgpu.barrier_wait(zeroed.at[0])
        store(1.0, reduction_op=op)
        if waits:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        store(2.0, reduction_op=op)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, M), jnp.float32),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((2, M, M), jnp.float32), plgpu.Barrier(num_barriers=1)],
    )


def test_sums_in_memory_do_not_race_with_each_other(plgpu, pl):
    np.testing.assert_array_equal(run_simulated(addition(plgpu, pl)), 6.0)


@pytest.mark.parametrize(
    "bug, message",
    [
        ({"is_ordered": False}, "(write|sum) of .*\n.*(write|sum) of "),
        ({"commits": False}, "read of "),
        ({"waits": False}, "read of "),
    ],
    ids=["zeros-while-adding", "no-commit_smem", "source-overwritten"],
)
def test_sum_in_memory_that_races(plgpu, pl, bug, message):
    with pytest.raises(RaceError, match=message):
        run_simulated(addition(plgpu, pl, **bug))


def test_other_reductions_in_memory_are_refused(plgpu, pl):
    with pytest.raises(NotImplementedError, match="smax of float32 in memory"):
        run_simulated(addition(plgpu, pl, op="smax"))


def test_wgmma_operand_written_without_commit_smem_is_a_race(plgpu, pl, a, b):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded, a_smem):
        a_smem[...] = a_gmem[...]

        def multiply(acc):
            plgpu.wgmma(acc, a_smem, b_smem)
            return acc[...]

        out_gmem[...] = pl.run_scoped(multiply, plgpu.ACC((M, M), jnp.float32))

    with pytest.raises(RaceError, match=r"(?s)read of .*test_interpreter.py.*write of "):
        run_simulated(one_warpgroup(plgpu, body, scratch=[tiles(plgpu, M, M)]), a, b)


@pytest.mark.parametrize("waits", [True, False])
def test_wgmma_operand_must_not_change_before_it_is_awaited(plgpu, pl, a, b, waits):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded):
        def multiply(acc):
            plgpu.wgmma(acc, a_gmem[...], b_smem)
            if waits:
                plgpu.wgmma_wait(0)
            plgpu.copy_gmem_to_smem(a_gmem, b_smem, loaded.at[0])
            plgpu.barrier_wait(loaded.at[0])
            return acc[...]

        out_gmem[...] = pl.run_scoped(multiply, plgpu.ACC((M, M), jnp.float32))

    kernel = one_warpgroup(plgpu, body)
    if waits:
        np.testing.assert_allclose(run_simulated(kernel, a, b), matmul(a, b), rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(RaceError):
            run_simulated(kernel, a, b)


def test_accumulator_read_without_waiting(plgpu, pl, a, b):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded):
        def multiply(acc):
            plgpu.wgmma(acc, a_gmem[...], b_smem)
            return plgpu.wgmma_accumulator_load(acc, wait_n=1)

        out_gmem[...] = pl.run_scoped(multiply, plgpu.ACC((M, M), jnp.float32))

    with pytest.raises(Exception, match="while a wgmma that adds to it is in flight"):
        run_simulated(one_warpgroup(plgpu, body), a, b)


def ring(plgpu, pl, *, producer_waits=True, consumer_arrives_late=True, pages=4, slots=2):
    """out[i] = x[i] @ b through a ring that a second warpgroup fills; with a bug on demand."""

    def kernel(x_gmem, b_gmem, out_gmem, x_smem, b_smem, b_loaded, full, empty):
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 1)
        def produce():
            plgpu.copy_gmem_to_smem(b_gmem, b_smem, b_loaded.at[0])

            @pl.loop(0, pages)
            def _(i):
                slot = lax.rem(i, jnp.int32(slots))
                if producer_waits:
                    pl.when(i >= slots)(lambda: plgpu.barrier_wait(empty.at[slot]))
                plgpu.copy_gmem_to_smem(x_gmem.at[i], x_smem.at[slot], full.at[slot])

        @pl.when(warpgroup == 0)
        def consume():
            plgpu.barrier_wait(b_loaded.at[0])

            @pl.loop(0, pages)
            def _(i):
                slot = lax.rem(i, jnp.int32(slots))
                plgpu.barrier_wait(full.at[slot])

                def multiply(acc):
                    plgpu.wgmma(acc, x_smem.at[slot], b_smem)
                    if not consumer_arrives_late:
                        plgpu.barrier_arrive(empty.at[slot])
                    return acc[...]

                out_gmem[i] = pl.run_scoped(multiply, plgpu.ACC((M, M), jnp.float32))
                if consumer_arrives_late:
                    plgpu.barrier_arrive(empty.at[slot])

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((pages, M, M), jnp.float32),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            tiles(plgpu, slots, M, M),
            tiles(plgpu, M, M),
            plgpu.Barrier(num_barriers=1),
            plgpu.Barrier(num_barriers=slots),
            plgpu.Barrier(num_barriers=slots),
        ],
    )


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((4, M, M)), jnp.bfloat16)


def test_ring_with_barriers_left_unobserved_at_the_end(plgpu, pl, x, b):
    got = run_simulated(ring(plgpu, pl), x, b)
    np.testing.assert_allclose(got, matmul(x, b), rtol=1e-5, atol=1e-5)


def test_producer_that_overwrites_a_page_in_use(plgpu, pl, x, b):
    with pytest.raises(Exception, match=r"RACE|observ"):
        run_simulated(ring(plgpu, pl, producer_waits=False), x, b)


def test_consumer_that_frees_a_page_before_its_wgmma_has_ended(plgpu, pl, x, b):
    with pytest.raises(RaceError):
        run_simulated(ring(plgpu, pl, consumer_arrives_late=False), x, b)


def test_race_of_a_kernel_that_is_not_the_last(plgpu, pl, x, b):
    def two_kernels(x, b):
        return ring(plgpu, pl, consumer_arrives_late=False)(x, b), ring(plgpu, pl)(x, b)

    with pytest.raises(RaceError):
        run_simulated(two_kernels, x, b)


def test_kernel_that_hangs(plgpu, a, b):
    def body(a_gmem, b_gmem, out_gmem, b_smem, loaded):
        plgpu.barrier_wait(loaded.at[0])  # nobody arrives a second time

    with pytest.raises(Exception, match="no end after 3 s"):
        run_simulated(one_warpgroup(plgpu, body), a, b, seconds=3)


def test_simulation_works_again_after_an_error(plgpu, pl, x, b):
    with pytest.raises(ZeroDivisionError), simulate():
        jax.block_until_ready(ring(plgpu, pl)(x, b))
        raise ZeroDivisionError
    np.testing.assert_allclose(
        run_simulated(ring(plgpu, pl), x, b), matmul(x, b), rtol=1e-5, atol=1e-5
    )
