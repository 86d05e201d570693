"""TMA stores that add to memory, which the GPU interpreter of jax 0.11.2 and 0.12.0 lacks.

Private APIs, for tests only.
"""

import collections
import functools
import threading

import jax
import numpy as np
from jax._src import source_info_util
from jax._src.pallas.mosaic.interpret import race_detection_state
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret, shared_memory
from jax._src.pallas.mosaic_gpu.interpret import race_detection_state as gpu_race_detection_state
from kernel_tools.interpreter_call import call_on_host

ADDITION = threading.Lock()  # held from the load to the store of a sum


class RaceState(gpu_race_detection_state.GPURaceDetectionState):
    """Sums in the same memory race with reads and writes, but not with each other."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sums = collections.defaultdict(list)  # key -> [(clock, access, line)]

    def check_read(self, thread, clock, key, access, source_info=None):
        super().check_read(thread, clock, key, access, source_info)
        self._check_against_sums("read", clock, key, access, source_info)

    def check_write(self, thread, clock, key, access, source_info=None):
        super().check_write(thread, clock, key, access, source_info)
        self._check_against_sums("write", clock, key, access, source_info)

    def check_sum(self, clock, key, access, source_info):
        line = _line(source_info)
        with self.lock:
            self.sums[key].append((clock, access, line))
            reads, writes = list(self.reads[key]), list(self.writes[key])
        for name, others in (("read", reads), ("write", writes)):
            for _, other_clock, other_range, other_line in others:
                other = other_clock, other_range, f"{name} of {other_line}"
                _raise_if_unordered(f"sum of {line}", clock, access, *other)

    def _check_against_sums(self, name, clock, key, access, source_info):
        with self.lock:
            sums = list(self.sums[key])
        line = f"{name} of {_line(source_info)}"
        for other_clock, other_access, other_line in sums:
            other = other_clock, other_access.range, f"sum of {other_line}"
            _raise_if_unordered(line, clock, access, *other)


def _raise_if_unordered(line, clock, access, other_clock, other_range, other_line):
    overlaps = race_detection_state._ranges_overlap(access.range, other_range)
    if overlaps and not other_clock.ordered(clock):
        raise RuntimeError(f"RACE DETECTED\n  {line}\n  {other_line}")


def _line(source_info) -> str:
    return "the caller" if source_info is None else source_info_util.summarize(source_info)


def store_to_gmem(self, eqn, token, values):
    """copy_smem_to_gmem with predicate= or reduction_op="add" (missing in 0.11 and 0.12)."""
    params = {**eqn.params, "has_user_predicate": False}
    store_op = self._interpret_copy_smem_to_gmem_p
    if (reduction_op := params["reduction_op"]) is not None:
        if reduction_op != "add" or eqn.invars[1].aval.dtype != np.float32:
            raise NotImplementedError(f"{reduction_op} of {eqn.invars[1].aval.dtype} in memory")
        store_op = functools.partial(_add_to_gmem, self)
    if not eqn.params["has_user_predicate"]:
        return store_op(eqn, token, *values, **params)
    *values, predicate = values

    def store(token):
        return store_op(eqn, token, *values, **params)[0]

    return jax.lax.cond(predicate, store, lambda token: token, token), []


def _add_to_gmem(self, eqn, token, src, dst, *leaves, src_transforms_treedef, **params):
    """copy_smem_to_gmem(reduction_op="add")."""
    tree = jax.tree_util.treedef_tuple((src_transforms_treedef, params["dst_transforms_treedef"]))
    operands = {
        name: jaxpr_interpret.resolve_ref(var.aval, key, transforms)
        for name, var, key, transforms in zip(
            ("src", "dst"), eqn.invars, (src, dst), jax.tree.unflatten(tree, leaves), strict=False
        )
    }
    return call_on_host(self, token, _reduce, source_info=eqn.source_info, **operands), []


def _reduce(memory, thread, logging, *, src, dst, source_info):
    operands = {}
    for name, (key, transforms) in (("src", src), ("dst", dst)):
        key = shared_memory.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        operands[f"{name}_allocation_key"] = key
        operands[f"{name}_access"] = memory.access(key, transforms)
    clock = memory.incr_clock(thread)
    where = dict(mesh_location=logging.mesh_location, thread=thread, source_info=source_info)
    memory.execute_async_task(_Addition(**operands, **where, clock=clock))


class _Addition(gpu_callbacks.AsyncCopySmemToGmemTask):
    """A TMA store that adds: the part of its source that lies in the destination, all at once."""

    def post_read(self, tma_thread_id, memory):
        self.clock.inc(tma_thread_id)
        self.write_clock = self.clock.copy()
        gpu_callbacks.get_races().check_sum(
            self.clock.async_smem_clock.copy(),
            self.dst_allocation_key,
            self.dst_access,
            self.source_info,
        )

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        load = functools.partial(memory.get_buffer_content, logging_info=self.logging_info)
        value, _, _ = load(self.src_allocation_key, self.src_access, self.thread)
        self.post_read(tma_thread_id, memory)
        shape = tuple(memory.buffer_shape_and_dtype(self.dst_allocation_key).shape)
        clipped = gpu_callbacks._clip_store_to_shape(self.dst_access, value, shape)
        if clipped is not None:
            access, value = clipped
            with ADDITION:
                before, _, _ = load(self.dst_allocation_key, access, self.thread)
                memory.store_buffer_content(
                    self.dst_allocation_key, access, before + value, self.thread
                )
        self.post_write(tma_thread_id, memory)
