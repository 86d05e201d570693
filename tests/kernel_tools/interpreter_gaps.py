"""What the GPU interpreter of jax 0.11.2 and 0.12.0 lacks for our kernels, one function per gap.

Private APIs, for tests only. `closed()` patches them in; `interpret` sends the primitives of GAPS
here and leaves every other equation to JAX.
"""

import collections
import contextlib
import functools
import types
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
from jax._src import core as jax_core
from jax._src import source_info_util
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic.interpret.utils import JaxprEnv
from jax._src.pallas.mosaic_gpu import core as gpu_core
from jax._src.pallas.mosaic_gpu import primitives as gpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.pallas.mosaic_gpu.interpret import race_detection_state as gpu_race_detection_state
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import (
    reset_gpu_interpret_mode_state as reset_gpu_interpret_mode_state,
)
from jax._src.pallas.mosaic_gpu.interpret.params import (
    InterpretGPUParams,
)
from jax._src.pallas.mosaic_gpu.interpret.params import (
    force_gpu_interpret_mode as force_gpu_interpret_mode,
)
from jax._src.state.discharge import run_state_p
from jax._src.state.types import AbstractRef
from kernel_tools import interpreter_sums
from kernel_tools.interpreter_call import call_on_host

# Each asynchronous operation takes the next of these places in the vector clocks; two operations
# that share one can hide each other's races.
PARAMETERS = InterpretGPUParams(detect_races=True, num_tma_threads_per_device=64)
REGS = gpu_core.MemorySpace.REGS


@contextlib.contextmanager
def closed() -> Iterator[list[str]]:
    """Closes the gaps; yields a list that fills with descriptions of races as kernels run."""
    interpreter, memory = jaxpr_interpret.JaxprInterpreter, shared_memory.GPUSharedMemory
    races: list[str] = []
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (interpreter, "interpret", _interpret(interpreter.interpret)),
            (gpu_callbacks, "GPURaceDetectionState", _raising_race_state(races)),
            (memory, "kernel_thread_finished", _all_awaited(memory.kernel_thread_finished)),
            *_unobserved_barriers(),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for module in (race_detection_state, gpu_race_detection_state):
            print_ = mock.patch.object(module, "print", _raise_instead_of_print, create=True)
            stack.enter_context(print_)
        yield races


def fail_all_threads(message: str) -> None:
    """Makes every waiting thread of the running kernel raise, so that a hang becomes an error."""
    if (memory := gpu_callbacks._shared_memory) is not None:
        memory.set_failed(TimeoutError(message), top_level=False)


def _raising_race_state(races: list[str]):
    """Races are errors that say which lines, in all kernels of a program (0.11.2 prints them).

    Registers belong to one thread and are left out: their ids repeat from block to block.
    """
    registers = shared_memory.get_memory_space_idx(REGS)

    class RaceState(interpreter_sums.RaceState):
        def check_read(self, thread, clock, key, *args, **kwargs):
            if key.memory_space_id != registers:
                with _recorded(races):
                    super().check_read(thread, clock, key, *args, **kwargs)

        def check_write(self, thread, clock, key, *args, **kwargs):
            if key.memory_space_id != registers:
                with _recorded(races):
                    super().check_write(thread, clock, key, *args, **kwargs)

        def check_sum(self, *args):
            with _recorded(races):
                super().check_sum(*args)

    return RaceState


@contextlib.contextmanager
def _recorded(races: list[str]):
    try:
        yield
    except RuntimeError as race:
        lines = str(race).splitlines()
        races.append("\n".join(line for line in lines if "clock:" not in line))
        raise


def _raise_instead_of_print(message: str) -> None:
    raise RuntimeError(message)


def _unobserved_barriers():
    """A kernel may end without waiting for the last phases of a barrier: 0.12's rule, in 0.11.2."""
    barrier = shared_memory.Barrier
    if hasattr(shared_memory, "BarrierReallocationChecker"):
        return
    deallocate = barrier.deallocate

    def without_unobserved(self):
        with self.cv:
            if self.ref_count == 1:
                self.last_observed_phase_by_thread.clear()
        deallocate(self)

    yield barrier, "deallocate", without_unobserved


def _interpret(upstream):
    """An interpreter that handles GAPS and gives `upstream` all other equations, one at a time."""

    def interpret(self, jaxpr, token, *args):
        if isinstance(jaxpr, _Scope):
            return jaxpr.run(token, *args)
        env = JaxprEnv(vars=jaxpr.constvars + jaxpr.invars, values=args)
        for eqn in jaxpr.eqns:
            info = eqn.source_info
            with source_info_util.user_context(info.traceback, name_stack=info.name_stack):
                handle = GAPS.get(eqn.primitive, functools.partial(_alone, upstream))
                token, out = handle(self, eqn, token, env.read_many(eqn.invars))
            env.write_many(eqn.outvars, out)
        return token, env.read_many(jaxpr.outvars)

    return interpret


def _alone(upstream, self, eqn, token, values):
    """One equation, by JAX's interpreter."""
    is_variable = [not isinstance(v, jax_core.Literal) for v in eqn.invars]
    program = types.SimpleNamespace(
        constvars=[],
        invars=[v for v, keep in zip(eqn.invars, is_variable, strict=True) if keep],
        eqns=[eqn],
        outvars=eqn.outvars,
    )
    return upstream(
        self, program, token, *(x for x, keep in zip(values, is_variable, strict=True) if keep)
    )


class _Scope:
    """Stands for the body of a run_scoped: refs to allocate, and a function of their keys."""

    def __init__(self, avals, run):
        self.invars = [types.SimpleNamespace(aval=aval) for aval in avals]
        self.run = run


def _run_state(self, eqn, token, values):
    """pl.run_state, as in `pl.run_state(f)(plgpu.ACC.init(x))` (missing in 0.11 and 0.12).

    Its operands become registers with a value, except refs of the kernel, which pass through.
    """
    body = eqn.params["jaxpr"]
    is_ref = [isinstance(v.aval, AbstractRef) for v in eqn.invars]
    avals = [_in_registers(v.aval) for v, ref in zip(body.invars, is_ref, strict=True) if not ref]

    def run(token, *keys):
        keys = iter(keys)
        operands = [x if ref else next(keys) for x, ref in zip(values, is_ref, strict=True)]
        for x, operand, ref in zip(values, operands, is_ref, strict=True):
            if not ref:
                token = _store(self, token, operand, x, eqn.source_info)
        token, _ = self.interpret(body, token, *operands)
        if any(isinstance(aval, gpu_core.WGMMAAbstractAccumulatorRef) for aval in avals):
            token = _wait(self, token, 0)
        out = list(operands)
        for i, ref in enumerate(is_ref):
            if not ref:
                token, out[i] = gpu_callbacks.call_get(
                    token=token,
                    result_shape_and_dtype=jax.typeof(values[i]),
                    mesh_location=self.mesh_location,
                    thread=self.thread,
                    allocation_key_as_array=operands[i],
                    transforms=(),
                )
        return token, out

    if not avals:
        return run(token)
    scoped = types.SimpleNamespace(
        primitive=pallas_primitives.run_scoped_p,
        source_info=eqn.source_info,
        params=dict(
            jaxpr=_Scope(avals, run), collective_axes=(), ref_transforms=((),) * len(avals)
        ),
    )
    return self._interpret_run_scoped_p(scoped, token, lambda: ())


def _in_registers(aval):
    return aval if aval.memory_space == REGS else aval.update(memory_space=REGS)


def _wgmma(self, eqn, token, values):
    """plgpu.wgmma with its left operand in registers, and with its reads checked for races.

    JAX's interpreter (0.11 and 0.12) takes shared memory only and checks no operand. Here a wgmma
    reads through the asynchronous proxy, as a TMA store does, and goes on reading until it is
    awaited: missing commit_smem, missing waits and operands overwritten too early are races.
    """
    acc, a, b, *leaves = values
    nothing = jax.tree.structure([])
    trees = [eqn.params[f"{name}_transforms_tree"] or nothing for name in ("acc", "a", "b")]
    transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    refs = {}
    operands = zip(("acc", "a", "b"), eqn.invars[:3], (acc, a, b), transforms, strict=True)
    for name, var, key, transform in operands:
        if isinstance(var.aval, AbstractRef):
            refs[name] = jaxpr_interpret.resolve_ref(var.aval, key, transform)
    registers = {} if "a" in refs else {"a": a}
    return call_on_host(
        self, token, _multiply, refs=refs, registers=registers, source_info=eqn.source_info
    ), []


def _multiply(memory, thread, logging, *, refs, registers, source_info):
    keys, accesses, operands = {}, {}, {name: np.asarray(x) for name, x in registers.items()}
    for name, (key, transforms) in refs.items():
        keys[name] = shared_memory.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        accesses[name] = memory.access(keys[name], transforms)
        operands[name], _, _ = memory.get_buffer_content(
            keys[name], accesses[name], thread, logging_info=logging
        )
    clock = memory.incr_clock(thread)
    clock.inc(memory.get_next_tma_thread_id())
    for name in ("a", "b"):
        if name in keys:
            gpu_callbacks.get_races().check_read(
                thread, clock.async_smem_clock.copy(), keys[name], accesses[name], source_info
            )
    with np.errstate(invalid="ignore"):  # keys past a length may be NaN: they are masked later
        product = np.matmul(operands["a"], operands["b"], dtype=operands["acc"].dtype)
    memory.store_buffer_content(
        keys["acc"], accesses["acc"], operands["acc"] + product, thread, logging_info=logging
    )
    _in_flight(memory)[thread].append((keys["acc"], clock))


def _wgmma_wait(self, eqn, token, values):
    """plgpu.wgmma_wait(n): all but the n newest of this thread's wgmmas have finished reading."""
    del values
    return _wait(self, token, eqn.params["n"]), []


def _read_accumulator(self, eqn, token, values):
    """acc[...] and wgmma_accumulator_load: a wait, then a read of what is finished."""
    if eqn.params["wait_n"] is not None:
        token = _wait(self, token, eqn.params["wait_n"])
    token = call_on_host(self, token, _must_be_finished, acc=values[0])
    token, out = self._interpret_wgmma_accumulator_deref_p(eqn, token, lambda: values)
    return token, [out]


def _write_accumulator(self, eqn, token, values):
    """acc[...] = value: plgpu.wgmma_accumulator_store, which 0.11 and 0.12 do not interpret."""
    acc, value = values
    token = call_on_host(self, token, _must_be_finished, acc=acc)
    return _store(self, token, acc, value, eqn.source_info), [value]


def _store(self, token, key, value, source_info):
    token, _ = gpu_callbacks.call_swap(
        token=token,
        result_shape_and_dtype=jax.typeof(value),
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        transforms=(),
        val=value,
        mask=None,
        source_info=source_info,
    )
    return token


def _wait(self, token, n):
    return call_on_host(self, token, _observe, n=n)


def _observe(memory, thread, logging, *, n):
    pending = _in_flight(memory)[thread]
    with memory.lock:
        while len(pending) > int(n):
            memory.clocks[thread].update(pending.popleft()[1])


def _must_be_finished(memory, thread, logging, *, acc):
    key = shared_memory.HostAllocationKey.from_array(acc)
    if any(key == pending for pending, _ in _in_flight(memory)[thread]):
        raise ValueError(f"accumulator {key} is used while a wgmma that adds to it is in flight")


def _all_awaited(upstream):
    """A thread of a kernel must not end while one of its wgmmas runs."""

    def kernel_thread_finished(self, thread):
        if pending := _in_flight(self)[thread]:
            raise ValueError(f"{thread} ended with {len(pending)} wgmmas in flight")
        upstream(self, thread)

    return kernel_thread_finished


def _in_flight(memory) -> dict[object, collections.deque]:
    """Thread to its wgmmas that nobody awaited: (key of the accumulator, clock of the reads)."""
    if not hasattr(memory, "wgmmas_in_flight"):
        with memory.lock:
            if not hasattr(memory, "wgmmas_in_flight"):
                memory.wgmmas_in_flight = collections.defaultdict(collections.deque)
    return memory.wgmmas_in_flight


def _nothing(self, eqn, token, values):
    """griddepcontrol: kernels run one after another here, so there is nothing to wait for."""
    return token, []


GAPS = {
    run_state_p: _run_state,
    gpu_primitives.wgmma_ref_p: _wgmma,
    gpu_primitives.wgmma_wait_p: _wgmma_wait,
    gpu_primitives.wgmma_accumulator_deref_p: _read_accumulator,
    gpu_primitives.wgmma_accumulator_store_p: _write_accumulator,
    gpu_primitives.copy_smem_to_gmem_p: interpreter_sums.store_to_gmem,
    gpu_primitives.griddepcontrol_wait_p: _nothing,
    gpu_primitives.griddepcontrol_launch_dependents_p: _nothing,
}
