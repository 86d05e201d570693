"""The skeleton of every kernel: one warpgroup loads, two consume; the walk over a CTA's tiles."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import mosaic_compat
from pallas_kernels.flash_attention.sm90.config import Config, Problem
from pallas_kernels.flash_attention.sm90.tiles import Tile
from pallas_kernels.sm90 import Ref, at_step

NUM_CONSUMERS = 2
Carry = TypeVar("Carry")
# Reads the fields of the tile at hand. Call it again after a loop, through which the fields would
# occupy registers.
ReadTile = Callable[[jax.Array], Tile]
Roles = tuple[Callable[[], None], Callable[[int], None]]  # what loads; what consumer i does


def run_kernel(
    body: Callable[[Any, tuple, Any], Roles],
    name: str,
    inputs: tuple,
    out_type: tuple,
    scratch_type: tuple,
    *,
    num_ctas: int,
    config: Config,
    sum_type: jax.ShapeDtypeStruct | None = None,
) -> list[jax.Array]:
    """Runs a kernel of three warpgroups on `inputs` and returns its results.

    body(inputs, outputs, scratch) sees Refs in place of arrays and types, and returns the roles of
    the warpgroups. With `sum_type`, one more result comes first: a sum that starts from zeros.
    """

    def kernel(inputs, *outputs, scratch):
        load, consume = body(inputs, outputs, scratch)
        wg = lax.axis_index("wg")

        @pl.when(wg == NUM_CONSUMERS)
        def _():
            plgpu.set_max_registers(config.memory_registers, action="decrease")
            load()

        for consumer in range(NUM_CONSUMERS):  # one branch each: constant addresses save registers

            @pl.when(wg == consumer)
            def _(consumer=consumer):
                plgpu.set_max_registers(config.registers, action="increase")
                consume(consumer)

    launch: Any = plgpu.kernel
    if sum_type is not None:
        launch = functools.partial(mosaic_compat.summing_kernel, sum_type=sum_type)
    return launch(
        kernel,
        out_type=list(out_type),
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=NUM_CONSUMERS + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=mosaic_compat.compiler_params(),
        scratch_types={"scratch": scratch_type},
    )(inputs)


def for_each_tile(tiles_gmem: Ref, body: Callable[[ReadTile, jax.Array], jax.Array]) -> None:
    """`step = body(read_tile, step)` for this CTA's tiles, with step 0 for the first."""
    cta, num_ctas = lax.axis_index("cta"), lax.axis_size("cta")
    num_turns = (tiles_gmem.shape[0] - cta + num_ctas - 1) // num_ctas

    def visit(turn, step):
        def read_tile(step):
            index = at_step(turn * num_ctas + cta, step)
            return Tile(*(tiles_gmem[index, field] for field in range(len(Tile._fields))))

        return body(read_tile, step)

    lax.fori_loop(0, num_turns, visit, jnp.int32(0))


def for_each_block(
    tile: Tile, begin: jax.Array, body: Callable[[bool, jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """`carry = body(is_masked, step, carry)` for every block that the tile meets."""
    middle, end = begin + tile.num_masked, begin + tile.num_blocks
    carry = lax.fori_loop(begin, middle, functools.partial(body, True), carry)
    return lax.fori_loop(middle, end, functools.partial(body, False), carry)


def for_each_head(
    problem: Problem, body: Callable[[jax.Array | int, Carry], Carry], carry: Carry
) -> Carry:
    """`carry = body(head, carry)` for the query heads of a split of a group."""
    if problem.heads_per_split == 1:
        return body(0, carry)
    return lax.fori_loop(0, problem.heads_per_split, body, carry)
